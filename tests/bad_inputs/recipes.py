"""Recipes that are not YAML, not files, or hold values that are not of their key's kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from finetune_assets.recipe.recipe import sections
from tests.bad_inputs.case import DEEP, LONG, PLAN, Case, Change
from tests.bad_inputs.changes import SPECIAL, recipe_text, recipe_value, special, text_file

GOOD = """\
dataset: { dataset: [facts], test_size: 2 }
model: { model_name_or_path: ./base }
ollama: { name: mini }
"""


def yaml_syntax() -> Iterator[Case]:
    """Texts that YAML's own reader chokes on, or that make of a small file a large structure."""
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
    )
    merges = "m0: &m0 {a: 1}\n" + "".join(
        f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 10)
    )
    texts: dict[str, str | bytes] = {
        "nothing": "",
        "white space": " \n\n",
        "a comment": "# nothing\n",
        "a list": "- a\n- b\n",
        "a word": "demo\n",
        "a number": "12\n",
        "null": "~\n",
        "two documents": f"{GOOD}---\n{GOOD}",
        "an end and more": f"{GOOD}...\nx: 1\n",
        "a directive": f"%YAML 9.9\n---\n{GOOD}",
        "an unknown directive tag": f"%TAG ! tag:evil,2026:\n---\n{GOOD}x: !y 1\n",
        "a tab": f"{GOOD}train:\n\tlora_rank: 8\n",
        "an open list": f"{GOOD}train: [",
        "an open mapping": f"{GOOD}train: {{",
        "an open text": f'{GOOD}train: "',
        "an open block": f"{GOOD}train: |",
        "an undefined alias": f"{GOOD}train: *nobody\n",
        "an anchor twice": f"{GOOD}x: &a 1\ny: &a 2\n",
        "a list in itself": f"{GOOD}train: &d [*d]\n",
        "a mapping in itself": f"{GOOD}train: &d {{ lora_rank: *d }}\n",
        "a file in itself": "&d\ndataset: *d\nmodel: *d\n",
        "a key that is itself": f"{GOOD}? &k [*k]\n: 1\n",
        "a list as key": f"{GOOD}? [a, b]\n: 1\n",
        "a mapping as key": f"{GOOD}? {{ a: b }}\n: 1\n",
        "a number as key": f"{GOOD}12: 1\n",
        "null as key": f"{GOOD}~: 1\n",
        "true as key": f"{GOOD}true: 1\n",
        "a date as key": f"{GOOD}2024-01-01: 1\n",
        "a long key": f"{GOOD}{'k' * 2000}: 1\n",
        "a section twice": f"{GOOD}train: {{}}\ntrain: {{ lora_rank: 8 }}\n",
        "a key twice": f"{GOOD}train: {{ lora_rank: 8, lora_rank: 9 }}\n",
        "a merge of a number": f"{GOOD}train: {{ <<: 5 }}\n",
        "a merge of a text": f"{GOOD}train: {{ <<: abc }}\n",
        "a merge of a list of numbers": f"{GOOD}train: {{ <<: [1, 2] }}\n",
        "a merge of null": f"{GOOD}train: {{ <<: ~ }}\n",
        "a merge of itself": f"{GOOD}train: &t {{ <<: *t }}\n",
        "a merge bomb": f"{GOOD}{merges}",
        "an alias bomb": f"{GOOD}{bomb}",
        "an alias bomb in a section": f"{bomb}{GOOD}train: *a11\n",
        "an alias bomb as a name": bomb + GOOD.replace("[facts]", "*a11"),
        "10 MB of comments": f"{GOOD}{'# ' + 'x' * 98 + chr(10)}" + ("# " + "x" * 97 + "\n") * 100_000,
        "10 MB in one text": f"{GOOD}train: {'x' * 10_000_000}\n",
        "10 MB of keys": GOOD + "".join(f"k{n}: 1\n" for n in range(1_000_000)),
        "a million items": f"{GOOD}train: [{'1,' * 400_000}1]\n",
        "UTF-16": GOOD.encode("utf-16"),
        "UTF-32": GOOD.encode("utf-32"),
        "GBK": GOOD.replace("mini", "客服").encode("gbk"),
        "Latin-1": GOOD.replace("mini", "Jürgen").encode("latin-1"),
        "a zip file": b"PK\x03\x04" + bytes(200),
        "a gzip file": b"\x1f\x8b\x08" + bytes(range(256)),
        "noughts": bytes(1000),
        "NUL in a text": GOOD.replace("mini", "mi\0ni"),
        "an escape character": GOOD.replace("mini", "mi\x1b[2Jni"),
        "a bell": GOOD.replace("mini", "mi\x07ni"),
        "a lone surrogate": GOOD.replace("mini", "mi\ud800ni"),
        "a NUL escaped": GOOD.replace("mini", '"mi\\0ni"'),
        "a surrogate escaped": GOOD.replace("mini", '"mi\\ud800ni"'),
        "a code point too large": GOOD.replace("mini", '"mi\\UFFFFFFFFni"'),
        "a wrong escape": GOOD.replace("mini", '"mi\\qni"'),
    }  # fmt: skip
    for depth in (2_000, 20_000, DEEP):
        texts[f"lists {depth} deep"] = f"{GOOD}train: {'[' * depth}{']' * depth}\n"
        texts[f"lists {depth} deep, open"] = f"{GOOD}train: {'[' * depth}"
        texts[f"mappings {depth} deep"] = f"{GOOD}train: {'{a: ' * depth}1{'}' * depth}\n"
        texts[f"dashes {depth} deep"] = f"{GOOD}train:\n {'- ' * depth}1\n"
    for depth in (500, 1_000):
        texts[f"blocks {depth} deep"] = GOOD + "train:\n" + "".join(f"{' ' * (n + 1)}a:\n" for n in range(depth))
    tags = ("!!int abc", "!!int ''", "!!int [1]", "!!float abc", "!!float ''", "!!bool maybe", "!!bool 7", "!!null x",
            "!!timestamp x", "!!timestamp 2024-02-30", "!!binary '*'", "!!binary é", "!!omap x", "!!omap [1]",
            "!!omap [{a: 1, b: 2}]", "!!pairs x", "!!pairs [1]", "!!set [1]", "!!set x", "!!map [1]", "!!map x",
            "!!seq x",
            "!!seq {a: 1}", "!!str [1]", "!!str {a: 1}", "!!merge x", "!!value x", "!unknown 1", "!!unknown 1",
            "!!python/none", "!!python/name:os.system", "!!python/object/apply:os.system ['touch evil']",
            "!!python/object/new:os.system ['touch evil']", "!!python/tuple [1]", "!<tag:x> 1", "! [1", "!!", "&", "*",
            "2024-02-30", "2024-13-01", "0000-00-00", "2024-01-01 25:00:00", "2024-01-01T99:99:99Z", "9999-99-99", LONG,
            f"-{LONG}", f"0x{LONG}", f"0b{'1' * 20000}", f"1:{LONG}", f"{LONG}.5", f"1e{LONG}", f"1_{LONG}",
            "190:20:30:99")  # fmt: skip
    for tag in tags:
        for key in ("train: { lora_rank: %s }", "train: %s", "%s: 1", "- %s"):
            texts[f"{key % tag[:40]}"] = f"{GOOD}{key % tag}\n"
    for title, text in texts.items():
        yield Case("YAML", title, ("mini.yaml",), recipe_text(text))


def recipe_files() -> Iterator[Case]:
    """Things in configs/ that are not files, and names."""
    for kind in SPECIAL:
        for command in (PLAN, ("run", "mini"), ("artifacts", "mini"), ("verify", "mini"), ("chat", "mini", "-m", "x")):
            yield Case("recipe files", f"{kind}: {command[0]}", ("mini",), special("configs/mini.yaml", kind), command)
    for kind in SPECIAL:
        yield Case("recipe files", f"by path: {kind}", ("x.yaml",), special("x.yaml", kind), ("plan", "x.yaml"))
    for name in (
        "datasets",
        "a.b",
        "..",
        ".hidden",
        "x" * 200,
        "-x",
        "a/b",
        "a\nb",
        "a\x1b[2Jb",
        "a\u202eb",
        "😀",
        "a:b",
        "*",
    ):
        for command in ("plan", "run"):
            change = text_file(f"configs/{name}.yaml", GOOD) if "/" not in name else (lambda root: None)
            yield Case(
                "recipe files",
                f"{command} {name[:20]!r}",
                (".yaml", "recipe", "option"),
                change,
                (command, f"configs/{name}.yaml"),
            )


NUMBERS = (".inf", "-.inf", ".nan", "true", "no", "abc", "[1]", "{ a: 1 }", "2024-01-01", LONG, f"-{LONG}",
        "1" + "0" * 400,
           "'1\\0'", '"\\u0000"', "''", "[]", "!!binary aGk=", "1e400")  # fmt: skip
TEXTS = (
    "12",
    "1.5",
    "true",
    "[[1]]",
    "{ a: 1 }",
    "2024-01-01",
    ".nan",
    LONG,
    '"a\\0b"',
    '"a\\ud800b"',
    "!!binary aGk=",
)
SWITCHES = ("maybe", "7", "1.5", "[true]", "{ a: 1 }", "2024-01-01", ".nan", LONG, "'1\\0'", "!!binary aGk=")


def recipe_values() -> Iterator[Case]:
    """Every key of the recipe with values that are not of its kind."""
    for section, model in sections().items():
        for key, described in model.model_json_schema()["properties"].items():
            kinds = {
                kind.get("type", "enum" if "enum" in kind else None) for kind in described.get("anyOf", [described])
            }
            if "number" in kinds or "integer" in kinds:
                values = [*NUMBERS, *(["-7", "1.5", "2.25"] if "integer" in kinds and key != "seed" else ["-7"])]
                values = [
                    value for value in values if not (key in ("max_steps", "seed", "pissa_iter") and value == "-7")
                ]
                if "number" in kinds:
                    values += ["1.5"] if key.endswith("_size") and section == "dataset" else []
            elif "boolean" in kinds and "null" not in kinds:
                values = [*SWITCHES, "~"]
            elif "boolean" in kinds:
                values = list(SWITCHES)
            elif "array" in kinds:
                values = [value for value in TEXTS if value != "[[1]]"] + ["[[1]]", "[1]", "[~]", "[{a: 1}]"]
            elif "object" in kinds:
                values = [
                    "12",
                    "[1]",
                    "x",
                    "{ q8_0: x }",
                    "{ q8_0: -1 }",
                    "{ q8_0: .nan }",
                    "{ q8_0: .inf }",
                    "{ q9: 1 }",
                    "{ 1: 1 }",
                ]
            else:
                values = list(TEXTS)
            for value in values:
                yield Case("recipe values", f"{section}.{key}: {value[:30]}", (key,), recipe_value(section, key, value))
        yield Case("recipe values", f"{section}: an unknown key", ("zzz",), recipe_value(section, "zzz", "1"))
    for key in ("12", "[1]", "'x'", "true", "~", "2024-01-01", ".nan"):
        for section in sections():
            yield Case("recipe values", f"{section}: {key}", (section,), _section_is(section, key))


def _section_is(section: str, value: str) -> Change:
    def change(root: Path) -> None:
        file = root / "configs" / "mini.yaml"
        content = {name: part for name, part in yaml.safe_load(file.read_text()).items() if name != section}
        file.write_text(f"{yaml.safe_dump(content, sort_keys=False)}{section}: {value}\n")

    return change


def schedules() -> Iterator[Case]:
    """Cron expressions and time zones."""
    wrong = ("60 * * * *", "* 24 * * *", "* * 32 * *", "* * * 13 *", "* * * * 9", "-1 * * * *", "* * * *",
            "* * * * * *", "", " ",
             "a b c d e", "*/0 * * * *", "1- * * * *", ", * * * *", "1,, * * * *", "0 0 31 2 *",
             "0 0 30 2 *",
             "@hourly now", "* * * FOO *", "* * * * BAR", "*/x * * * *", "1/2/3 * * * *", "# * * * *",
             "* * * * 1#9", "L * * * *",
             "0 3 * * *\\n0 4 * * *", "９ 3 * * *", "* " * 5000, "1e3 * * * *", "0x5 * * * *", "٣ * * * *")  # fmt: skip
    for text in wrong:
        yield Case("schedules", f"cron {text[:30]!r}", ("cron",), recipe_value("schedule", "cron", f'"{text}"'))
    for text in (
        "Mars/Base",
        "../../etc/passwd",
        "/etc/passwd",
        "",
        "UTC\\0",
        "Europe",
        "utc+25",
        "a" * 5000,
        "..",
        "客服",
    ):
        yield Case(
            "schedules",
            f"zone {text[:30]!r}",
            ("timezone",),
            recipe_value("schedule", "execution_timezone", f'"{text}"'),
        )
