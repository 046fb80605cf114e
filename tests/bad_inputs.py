"""Bad inputs by the hundred: what a hostile or unlucky user can give, each to be answered by one clear message.

`python -m tests.bad_inputs [FAMILY]...` tries them all and prints a table; test_bad_inputs.py tries a sample. Every case
is a change of a small project and a command line. It passes when the command ends within `SECONDS`, with exit code 1 or
2, in bounded memory, without a traceback or an "unexpected" error, and when the message names what is wrong: the file,
the key, the line or the variable.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from finetune_assets.recipe import Recipe
from tests.conftest import make_mini

SECONDS = 10.0
MEMORY = 1_500_000_000  # bytes resident; a command with Dagster in it takes 0.25e9
ADDRESS_SPACE = 16 << 30  # what runs away is stopped before the machine is
DEEP = 100_000
LONG = "7" * 5_000  # digits
Change = Callable[[Path], None]
PLAN = ("plan", "mini")
DATA = ("run", "mini", "--to", "dataset_info")
BASE = ("run", "mini", "--to", "base_model")


@dataclass(frozen=True)
class Case:
    """One bad input.

    Args:
        names: the message has to hold one of these.
        change: what is done to the project's folder first.
    """

    family: str
    title: str
    names: tuple[str, ...]
    change: Change = lambda root: None
    command: tuple[str, ...] = PLAN
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """How a command ended. `code` is None if it had to be killed; `memory` in bytes."""

    code: int | None
    text: str
    seconds: float
    memory: int

    def fault(self, case: Case) -> str | None:
        """What is wrong with this answer to a bad input; None if nothing is."""
        if self.code is None or self.seconds > SECONDS:
            return f"did not end within {SECONDS:.0f} s"
        if "Traceback" in self.text or "unexpected " in self.text:
            return "an error that nobody foresaw"
        if self.code not in (1, 2):
            return f"exit code {self.code}"
        if self.memory > MEMORY:
            return f"took {self.memory / 1e6:.0f} MB"
        if not any(name in self.text for name in case.names):
            return f"the message names none of {', '.join(case.names)}"
        return None


# ---------------------------------------------------------------------------------------------------------- changes


def recipe_text(text: str | bytes) -> Change:
    """The recipe file has this content."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return lambda root: _replace(root / "configs" / "mini.yaml", lambda file: file.write_bytes(data))


def recipe_value(section: str, key: str, value: str) -> Change:
    """The recipe has one key more or another value for it, written as in YAML."""

    def change(root: Path) -> None:
        file = root / "configs" / "mini.yaml"
        content = yaml.safe_load(file.read_text())
        content.setdefault(section, {})[key] = "@@"
        quoted = yaml.safe_dump(content, sort_keys=False)
        file.write_text(quoted.replace("'@@'", value), encoding="utf-8")

    return change


def text_file(name: str, content: str | bytes) -> Change:
    """A file of the project has this content."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")

    def change(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        _replace(root / name, lambda file: file.write_bytes(data))

    return change


def registry(value: Any) -> Change:
    return text_file("data/dataset_info.json", value if isinstance(value, str | bytes) else json.dumps(value))


def special(name: str, kind: str) -> Change:
    """Something that is not a regular file stands in a file's place."""

    def make(file: Path) -> None:
        match kind:
            case "fifo":
                os.mkfifo(file)
            case "folder":
                file.mkdir()
            case "dangling link":
                file.symlink_to("nowhere")
            case "link to itself":
                file.symlink_to(file.name)
            case "socket":
                here = Path.cwd()
                os.chdir(file.parent)  # such paths are short
                try:
                    with socket.socket(socket.AF_UNIX) as listener:
                        listener.bind(file.name)
                finally:
                    os.chdir(here)
            case device:
                file.symlink_to(device)

    def change(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        _replace(root / name, make)

    return change


SPECIAL = ("fifo", "folder", "dangling link", "link to itself", "socket", "/dev/zero", "/dev/null", "/dev/tty")


def base_file(name: str, content: str | bytes | None) -> Change:
    """The base model is a small folder in which one file has this content, or is missing."""

    def change(root: Path) -> None:
        base_folder(root)
        file = root / "base" / name
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))

    return change


def base_special(name: str, kind: str) -> Change:
    def change(root: Path) -> None:
        base_folder(root)
        special(f"base/{name}", kind)(root)

    return change


def base_folder(root: Path) -> None:
    """A Llama of next to nothing: enough for everything that looks at files only."""
    folder = root / "base"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(safetensors())
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 1, "vocab_size": 4, "intermediate_size": 8, "torch_dtype": "float32",
}  # fmt: skip


def safetensors(head: Any = None, data: bytes = bytes(128)) -> bytes:
    """A file of one tensor, or with another head."""
    if head is None:
        head = {"model.embed_tokens.weight": {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]}}
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + data


def _replace(file: Path, make: Callable[[Path], Any]) -> None:
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)
    make(file)


# --------------------------------------------------------------------------------------------------------- families

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
    merges = "m0: &m0 {a: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 10))
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
        "an alias bomb as a name": f"{bomb}dataset: {{ dataset: *a11 }}\nmodel: {{ model_name_or_path: ./base }}\nollama: {{ name: mini }}\n",
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
            "!!omap [{a: 1, b: 2}]", "!!pairs x", "!!pairs [1]", "!!set [1]", "!!set x", "!!map [1]", "!!map x", "!!seq x",
            "!!seq {a: 1}", "!!str [1]", "!!str {a: 1}", "!!merge x", "!!value x", "!unknown 1", "!!unknown 1",
            "!!python/none", "!!python/name:os.system", "!!python/object/apply:os.system ['touch evil']",
            "!!python/object/new:os.system ['touch evil']", "!!python/tuple [1]", "!<tag:x> 1", "! [1", "!!", "&", "*",
            "2024-02-30", "2024-13-01", "0000-00-00", "2024-01-01 25:00:00", "2024-01-01T99:99:99Z", "9999-99-99", LONG,
            f"-{LONG}", f"0x{LONG}", f"0b{'1' * 20000}", f"1:{LONG}", f"{LONG}.5", f"1e{LONG}", f"1_{LONG}", "190:20:30:99")  # fmt: skip
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
    for name in ("datasets", "a.b", "..", ".hidden", "x" * 200, "-x", "a/b", "a\nb", "a\x1b[2Jb", "a\u202eb", "😀", "a:b", "*"):
        for command in ("plan", "run"):
            change = text_file(f"configs/{name}.yaml", GOOD) if "/" not in name else (lambda root: None)
            yield Case("recipe files", f"{command} {name[:20]!r}", (".yaml", "recipe", "option"), change, (command, f"configs/{name}.yaml"))  # fmt: skip


NUMBERS = (".inf", "-.inf", ".nan", "true", "no", "abc", "[1]", "{ a: 1 }", "2024-01-01", LONG, f"-{LONG}", "1" + "0" * 400,
           "'1\\0'", '"\\u0000"', "''", "[]", "!!binary aGk=", "1e400")  # fmt: skip
TEXTS = ("12", "1.5", "true", "[[1]]", "{ a: 1 }", "2024-01-01", ".nan", LONG, '"a\\0b"', '"a\\ud800b"', "!!binary aGk=")
SWITCHES = ("maybe", "7", "1.5", "[true]", "{ a: 1 }", "2024-01-01", ".nan", LONG, "'1\\0'", "!!binary aGk=")


def recipe_values() -> Iterator[Case]:
    """Every key of the recipe with values that are not of its kind."""
    for section, model in _sections():
        for key, described in model.model_json_schema()["properties"].items():
            kinds = {kind.get("type", "enum" if "enum" in kind else None) for kind in described.get("anyOf", [described])}
            if "number" in kinds or "integer" in kinds:
                values = [*NUMBERS, *(["-7", "1.5", "2.25"] if "integer" in kinds and key != "seed" else ["-7"])]
                values = [value for value in values if not (key in ("max_steps", "seed", "pissa_iter") and value == "-7")]
                if "number" in kinds:
                    values += ["1.5"] if key.endswith("_size") and section == "dataset" else []
            elif "boolean" in kinds and "null" not in kinds:
                values = [*SWITCHES, "~"]
            elif "boolean" in kinds:
                values = list(SWITCHES)
            elif "array" in kinds:
                values = [value for value in TEXTS if value != "[[1]]"] + ["[[1]]", "[1]", "[~]", "[{a: 1}]"]
            elif "object" in kinds:
                values = ["12", "[1]", "x", "{ q8_0: x }", "{ q8_0: -1 }", "{ q8_0: .nan }", "{ q8_0: .inf }", "{ q9: 1 }", "{ 1: 1 }"]
            else:
                values = list(TEXTS)
            for value in values:
                yield Case("recipe values", f"{section}.{key}: {value[:30]}", (key,), recipe_value(section, key, value))
        yield Case("recipe values", f"{section}: an unknown key", ("zzz",), recipe_value(section, "zzz", "1"))
    for key in ("12", "[1]", "'x'", "true", "~", "2024-01-01", ".nan"):
        for section, _ in _sections():
            yield Case("recipe values", f"{section}: {key}", (section,), _section_is(section, key))


def _section_is(section: str, value: str) -> Change:
    def change(root: Path) -> None:
        file = root / "configs" / "mini.yaml"
        content = {name: part for name, part in yaml.safe_load(file.read_text()).items() if name != section}
        file.write_text(f"{yaml.safe_dump(content, sort_keys=False)}{section}: {value}\n")

    return change


def _sections() -> list[tuple[str, type[BaseModel]]]:
    found = []
    for name, info in Recipe.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found.append((name, kind))
    return found


def schedules() -> Iterator[Case]:
    """Cron expressions and time zones."""
    wrong = ("60 * * * *", "* 24 * * *", "* * 32 * *", "* * * 13 *", "* * * * 9", "-1 * * * *", "* * * *", "* * * * * *", "", " ",
             "a b c d e", "*/0 * * * *", "5-1 * * * *", "1- * * * *", ", * * * *", "1,, * * * *", "0 0 31 2 *", "0 0 30 2 *",
             "@hourly now", "* * * FOO *", "* * * * BAR", "*/x * * * *", "1/2/3 * * * *", "# * * * *", "* * * * 1#9", "L * * * *",
             "0 3 * * *\\n0 4 * * *", "９ 3 * * *", "* " * 5000, "1e3 * * * *", "0x5 * * * *", "٣ * * * *")  # fmt: skip
    for text in wrong:
        yield Case("schedules", f"cron {text[:30]!r}", ("cron",), recipe_value("schedule", "cron", f'"{text}"'))
    for text in ("Mars/Base", "../../etc/passwd", "/etc/passwd", "", "UTC\\0", "Europe", "utc+25", "a" * 5000, "..", "客服"):
        yield Case("schedules", f"zone {text[:30]!r}", ("timezone",), recipe_value("schedule", "execution_timezone", f'"{text}"'))  # fmt: skip


def registries() -> Iterator[Case]:
    """dataset_info.json."""
    names = ("dataset_info.json", "facts", "data")
    for kind in SPECIAL:
        yield Case("registry", kind, names, special("data/dataset_info.json", kind))
        yield Case("registry", f"the file is a {kind}", names, special("data/facts.json", kind))
        yield Case("registry", f"the folder is a {kind}", names, special("data", kind) if kind != "folder" else special("data/dataset_info.json", "folder"))  # fmt: skip
    values: list[Any] = ["", " ", "null", "12", "[]", "{", "{}", '{"facts": 12}', '{"facts": null}', '{"facts": []}', '{"facts": "facts.json"}',
                         '{"facts": true}', '{"facts": {}}', '{"facts": {"file_name": 12}}', '{"facts": {"file_name": null}}',
                         '{"facts": {"file_name": ["facts.json"]}}', '{"facts": {"file_name": ""}}', "NaN", '{"facts": NaN}',
                         "[" * DEEP, '{"a":' * DEEP, f'{{"facts": {LONG}}}', '{"facts": {"file_name": "facts.json"}} x', b"\xff\xfe",
                         b'{"facts": {"file_name": "f\xffacts.json"}}', '{"facts": {"file_name": "facts.json",}}', "{'facts': 1}",
                         '{"fact": {"file_name": "facts.json"}}', '{"Facts": {"file_name": "facts.json"}}', "\0", '{"facts\\u0000": 1}']  # fmt: skip
    for file in ("../facts.json", "/etc/passwd", "nowhere.json", ".", "..", "facts.JSONX", "facts.txt", "a\\u0000b.json", "\\ud800.json", "x" * 300 + ".json",
                 "x/" * 3000 + "f.json", "~/facts.json", "facts.json/", "dataset_info.json/..", "//facts.json", "\\n", " ", "file:///etc/passwd",
                 "http://127.0.0.1:9/x.json", "C:\\\\facts.json", "..\\\\facts.json", "$HOME/facts.json", "facts.json\\u202e"):  # fmt: skip
        values.append(f'{{"facts": {{"file_name": "{file}"}}}}')
    for key, bad in (("formatting", ['"x"', "12", "null", "[]"]), ("columns", ['"x"', "12", "[]", '{"promt": "x"}', '{"prompt": 12}', '{"prompt": null}',
                     '{"prompt": ["a"]}', '{"prompt": "nobody"}', '{"response": "nobody"}', '{"history": "nobody"}', '{"prompt": "\\u0000"}', '{"prompt": ""}']),
                     ("zzz", ["1"]), ("file_nam", ['"facts.json"']), ("script_url", ['"evil.py"'])):  # fmt: skip
        for value in bad:
            values.append(f'{{"facts": {{"file_name": "facts.json", "{key}": {value}}}}}')
    for value in values:
        shown = value if isinstance(value, str) else repr(value)
        yield Case("registry", shown[:50], (*names, "columns", "no such"), registry(value), DATA)


def data_files() -> Iterator[Case]:
    """Files of rows: cut short, in another encoding, of another shape."""
    rows = json.dumps(
        [{"instruction": f"Say {n}.", "input": "", "output": f"{n}!", "history": []} for n in range(12)], indent=1
    ).encode()
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in json.loads(rows))
    numbers = random.Random(0)
    files: dict[str, list[tuple[str, bytes]]] = {"json": [], "jsonl": []}
    for suffix, good in (("json", rows), ("jsonl", lines)):
        found = files[suffix]
        for at in sorted(numbers.sample(range(1, len(good) - 4), 60)):
            if suffix == "json" or good[at - 1 : at] not in (b"\n",) and good[at : at + 1] != b"\n":
                found.append((f"cut after {at} bytes", good[:at]))
            found.append((f"byte ff at {at}", good[:at] + b"\xff" + good[at:]))
        for at in sorted(numbers.sample(range(1, len(good) - 4), 20)):
            found.append((f"NUL at {at}", good[:at] + b"\0" + good[at:]))
        deep = b"[" * DEEP + b"]" * DEEP
        for value in (b"NaN", b"Infinity", b"-Infinity", LONG.encode(), b"1e999", deep, b'{"a":' * DEEP, b"\xed\xa0\x80", b'"\\ud800"',
                      b'"a\\u0000b"', b"12", b"true", b"[]", b"{}", b"[1]", b"1.5", b"tru", b"'x'", b"undefined", b"0x10", b"01", b"+1"):  # fmt: skip
            for column in (b"instruction", b"output", b"input", b"history", b"system"):
                row = b'{"instruction": "Say it.", "output": "It.", "input": "", "extra": 1'
                if column in (b"history",) and value == b"[]" or column == b"system" and value in ():
                    continue
                bad = row.replace(b'"' + column + b'": "Say it."', b"").replace(b'"' + column + b'": "It."', b"")
                bad = bad.replace(b"{,", b"{").replace(b", ,", b",") + b', "' + column + b'": ' + value + b"}"
                found.append((f"{column.decode()} is {value[:20].decode(errors='replace')}", b"[" + bad + b"]" if suffix == "json" else bad))
    for suffix, found in files.items():
        for title, content in found:
            yield _data(f"{suffix}: {title}", content, suffix)
    shapes: dict[str, bytes] = {
        "nothing": b"", "white space": b" \n\n ", "[]": b"[]", "{}": b"{}", "null": b"null", "a number": b"7", "a text": b'"x"', "[1]": b"[1]", "[[]]": b"[[]]",
        "[null]": b"[null]", "an object of rows": b'{"rows": []}', "UTF-16": rows.decode().encode("utf-16"), "UTF-32": rows.decode().encode("utf-32"),
        "GBK": '[{"instruction": "你是谁", "output": "米赞"}]'.encode("gbk"), "a zip file": b"PK\x03\x04" + bytes(300), "a gzip file": b"\x1f\x8b" + bytes(range(256)),
        "parquet": b"PAR1" + bytes(300) + b"PAR1", "CSV": b"instruction,output\na,b\n", "noughts": bytes(10_000), "deep": b"[" * DEEP, "a comment": b"// x\n" + rows,
        "two arrays": rows + rows, "more behind": rows + b"x", "single quotes": b"[{'instruction': 'a', 'output': 'b'}]", "no columns": b'[{"q": "a", "a": "b"}]' * 1,
        "empty answers": b'[{"instruction": "a", "output": ""}]', "blank answers": b'[{"instruction": "a", "output": " \\n"}]', "no question": b'[{"instruction": "", "output": "b"}]',
        "one row for two": b'[{"instruction": "a", "output": "b"}]', "pairs of three": b'[{"instruction": "a", "output": "b", "history": [["a", "b", "c"]]}]',
        "pairs of numbers": b'[{"instruction": "a", "output": "b", "history": [[1, 2]]}]', "history is a text": b'[{"instruction": "a", "output": "b", "history": "x"}]',
        "200 MB in one text": b'[{"instruction": "' + b"x" * 200_000_000, "a surrogate's half": b'[{"instruction": "a\\ud83d", "output": "b"}]',
    }  # fmt: skip
    for title, content in shapes.items():
        yield _data(title, content, "json")


def _data(title: str, content: bytes, suffix: str) -> Case:
    def change(root: Path) -> None:
        (root / "data" / "facts.json").unlink()
        (root / "data" / f"facts.{suffix}").write_bytes(content)
        (root / "data" / "dataset_info.json").write_text(json.dumps({"facts": {"file_name": f"facts.{suffix}"}}))

    return Case("data", title, (f"facts.{suffix}", "test_size", "columns"), change, DATA)


def base_models() -> Iterator[Case]:
    """Folders that are no models, and files in them that are not what they should be."""
    names = ("base", "config.json", "safetensors", "tokenizer")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        for kind in SPECIAL:
            yield Case("base model", f"{name} is a {kind}", (name, "base"), base_special(name, kind), BASE)
    for name in ("/", "~", "..", ".", "../..", "/etc", "/dev", "/proc", "~root", "./nowhere", "/nowhere", "a b", "a/b/c", "", "-", "http://x/y", "pypi:x", "pypi:x==1/y",
                 "pypi:x==1/../y.gguf", "pypi:../x==1/y.gguf", "./data", "configs/mini.yaml", "base\\n", "客服/模型", "x" * 5000, "a//b", "owner/..", "a\\u0000b"):  # fmt: skip
        yield Case("base model", f"named {name[:30]!r}", ("model", "base"), recipe_value("model", "model_name_or_path", f'"{name}"'), BASE)  # fmt: skip
    configs: list[str | bytes | None] = [None, "", "null", "[]", "12", '"x"', "{", "[" * DEEP, '{"a":' * DEEP, f'{{"vocab_size": {LONG}}}', b"\xff\xfe", "\0", '{"a": NaN}',
                                         '{"architectures": "\\ud800"}', b'{"architectures": ["a\xff"]}']  # fmt: skip
    for content in configs:
        yield Case("base model", f"config.json {content if content is None else content[:20]!r}", ("config.json",), base_file("config.json", content), BASE)  # fmt: skip
    good = safetensors()
    for at in (0, 1, 7, 8, 9, 20, 60, len(good) - 129, len(good) - 128, len(good) - 64, len(good) - 1):
        yield Case("base model", f"weights cut after {at} bytes", names, base_file("model.safetensors", good[:at]), BASE)
    entry = {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]}
    heads: list[Any] = [b"", b"null", b"[]", b"12", b"{", b"[" * DEEP, b'{"a":' * DEEP, b"\xff", b'{"a": NaN}', b'{"a": ' + LONG.encode() + b"}", {"a": 1}, {"a": None}, {"a": []}, {"a": {}}]  # fmt: skip
    for key, bad in (("dtype", [1, None, "F99", []]), ("shape", [1, None, "x", [-4, 8], [4.5, 8], ["4", 8], [10**30, 8]]),
                     ("data_offsets", [1, None, [], [0], [0, 1, 2], ["a", "b"], [-1, 128], [0, 10**30], [128, 0], [0, 64], [1, 129]])):  # fmt: skip
        heads += [{"model.embed_tokens.weight": entry | {key: value}} for value in bad]
    for head in heads:
        shown = head if isinstance(head, bytes) else json.dumps(head).encode()
        yield Case("base model", f"head {shown[:60]!r}", names, base_file("model.safetensors", safetensors(head)), BASE)
    yield Case("base model", "a head of 2^63 bytes", names, base_file("model.safetensors", struct.pack("<Q", 1 << 63) + b"{}"), BASE)
    yield Case("base model", "an LFS pointer", names, base_file("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"), BASE)  # fmt: skip
    for index in ("", "null", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": "nowhere.safetensors"}}',
                  '{"weight_map": {"a": "/etc/passwd"}}', "[" * DEEP, "\xff", '{"weight_map": {}}', f'{{"weight_map": {LONG}}}', '{"weight_map": {"a": "\\u0000"}}'):  # fmt: skip
        yield Case("base model", f"index {index[:40]!r}", names, base_file("model.safetensors.index.json", index), BASE)
    for pickle in ("pytorch_model.bin", "model.pt", "model.ckpt"):
        yield Case("base model", f"only {pickle}", names, _only(pickle), BASE)


def _only(name: str) -> Change:
    def change(root: Path) -> None:
        base_folder(root)
        (root / "base" / "model.safetensors").rename(root / "base" / name)

    return change


def command_lines() -> Iterator[Case]:
    """Arguments."""
    words = ("nobody", "", " ", ".", "..", "/", "min", "MINI", "mini.yml", "mini/", "configs", "configs/", "a\x1bb", "x" * 5000, "客服", "--", "-x", "\ud800", "mini\n", "*", "configs/nobody.yaml")  # fmt: skip
    for command in ("run", "plan", "artifacts", "verify", "rollback", "chat"):
        for word in words:
            yield Case("command line", f"{command} {word[:20]!r}", ("recipe", "option", "RECIPE", "Usage"), command=(command, word))
    for word in ("", "mini", "/", "mini/", "/lora_adapter", "mini/lora", "a/b/c", "nobody/lora_adapter", "mini/lora_adapter", "../x/lora_adapter", "x" * 3000 + "/lora_adapter"):  # fmt: skip
        yield Case("command line", f"explain {word[:30]!r}", ("ASSET", "made", "recipe"), command=("explain", word))
    for options in (("--to", "nobody"), ("--to", ""), ("--to",), ("--nobody",), ("--to", "gguf"), ("extra",)):
        yield Case("command line", f"run mini {' '.join(options)}", ("--to", "--nobody", "extra", "Usage"), command=("run", "mini", *options))  # fmt: skip
    for options in (("--keep", "-1"), ("--keep", "x"), ("nobody",), ("--keep", "1.5"), ("../x",), ("/",)):
        yield Case("command line", f"gc {' '.join(options)}", ("--keep", "recipe", "nobody", "Usage"), command=("gc", *options))
    for options in (("--to", ""), ("--to", "zz"), ("--to", "../x"), ("--to",)):
        yield Case("command line", f"rollback mini {' '.join(options)}", ("made", "--to", "Usage"), command=("rollback", "mini", *options))  # fmt: skip
    for options in (("--with", ""), ("--with", "x"), ("--with", "base,base,x"), ("--max-new-tokens", "0"), ("--max-new-tokens", "x"), ("--with", "gguf"), ("--with", "adapter"),
                    ("--with", "merged"), ("--with", "ollama")):  # fmt: skip
        yield Case("command line", f"chat mini {' '.join(options)}", ("stage", "made", "--max-new-tokens", "with", "ollama"), command=("chat", "mini", "-m", "x", *options))  # fmt: skip


def surroundings() -> Iterator[Case]:
    """Environment variables, and a DAGSTER_HOME that is none."""
    for value in ("/nowhere", "/dev/null", "nowhere", "/", "a\x1bb", "x" * 5000, "/etc/passwd"):
        yield Case("surroundings", f"FINETUNE_PROJECT={value[:20]!r}", ("project",), environment={"FINETUNE_PROJECT": value})
        yield Case("surroundings", f"LLAMA_CPP_DIR={value[:20]!r}", ("LLAMA_CPP_DIR",), lambda root: base_folder(root), environment={"LLAMA_CPP_DIR": value})  # fmt: skip
    for value in ("/dev/null", "/dev/null/x", "/proc/x", "x\n" * 200, "x" * 5000, "/etc/passwd"):
        yield Case("surroundings", f"DAGSTER_HOME={value[:20]!r}", ("DAGSTER_HOME", value[:40], "passwd"), command=("run", "mini", "--to", "raw_dataset"), environment={"DAGSTER_HOME": value})  # fmt: skip


FAMILIES: dict[str, Callable[[], Iterator[Case]]] = {
    "yaml": yaml_syntax,
    "files": recipe_files,
    "values": recipe_values,
    "schedules": schedules,
    "registry": registries,
    "data": data_files,
    "base": base_models,
    "commands": command_lines,
    "surroundings": surroundings,
}


# -------------------------------------------------------------------------------------------------------------- try


def attempt(case: Case, scratch: Path) -> Answer:
    """Do what a case says in a project of its own, in a child of this process, which has everything imported."""
    root = scratch / "project"
    make_mini(scratch)
    (root / "base").mkdir()
    before = dict(os.environ)
    case.change(root)
    log = scratch / "output"
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            handle = os.open(log, os.O_CREAT | os.O_WRONLY)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.environ.update({"FINETUNE_PROJECT": str(root), "DAGSTER_HOME": str(root / "dagster_home"), "TERM": "dumb", **case.environment})
            os.chdir(root)
            code = _main(case.command)
        finally:
            os._exit(code)
    status: int | None = None
    memory = 0
    while status is None and time.monotonic() - began < SECONDS + 2:
        done, ended, used = os.wait4(child, os.WNOHANG)
        if done:
            status, memory = ended, used.ru_maxrss * 1024
        else:
            time.sleep(0.01)
    seconds = time.monotonic() - began
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    os.environ.clear()
    os.environ.update(before)
    text = log.read_bytes().decode(errors="replace") if log.exists() else ""
    code = None if status is None else os.waitstatus_to_exitcode(status)
    return Answer(code, text, seconds, memory)


def _main(command: tuple[str, ...]) -> int:
    import traceback

    from rich.console import Console

    from finetune_assets import cli

    cli.out, cli.err = Console(width=200), Console(stderr=True, width=200)
    sys.argv = ["finetune", *command]
    try:
        cli.main()
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()


def cases(families: list[str]) -> list[Case]:
    """All cases of these families; of all if none is named."""
    return [case for name in families or FAMILIES for case in FAMILIES[name]()]


def warm() -> None:
    """Import once what every command would."""
    import dagster

    import finetune_assets.assets.chain
    import finetune_assets.cli
    import finetune_assets.run
    import finetune_assets.terminal.live

    assert dagster and finetune_assets.assets.chain and finetune_assets.terminal.live and finetune_assets.run


def main() -> int:
    warm()
    chosen = cases(sys.argv[1:])
    count: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    worst: dict[str, tuple[float, int]] = {}
    for number, case in enumerate(chosen):
        with tempfile.TemporaryDirectory(prefix="bad-input-") as scratch:
            answer = attempt(case, Path(scratch))
        count[case.family] += 1
        seconds, memory = worst.get(case.family, (0.0, 0))
        worst[case.family] = max(seconds, answer.seconds), max(memory, answer.memory)
        if (fault := answer.fault(case)) is not None:
            faults[case.family] += 1
            print(f"\n[{number}] {case.family}: {case.title}: {fault}\n    {answer.text.strip()[-600:]!r}", flush=True)
    print("\n| family | inputs | faults | slowest (s) | largest (MB) |\n|---|---|---|---|---|")
    for family, inputs in count.items():
        seconds, memory = worst[family]
        print(f"| {family} | {inputs} | {faults[family]} | {seconds:.1f} | {memory / 1e6:.0f} |")
    print(f"| all | {count.total()} | {faults.total()} | | |")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
