"""Registries and files of rows."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bad_inputs.case import DATA, DEEP, LONG, Case
from tests.bad_inputs.changes import SPECIAL, registry, special


def registries() -> Iterator[Case]:
    """dataset_info.json."""
    names = ("dataset_info.json", "facts", "data")
    for kind in SPECIAL:
        yield Case("registry", kind, names, special("data/dataset_info.json", kind))
        yield Case("registry", f"the file is a {kind}", names, special("data/facts.json", kind))
        yield Case(
            "registry",
            f"the folder is a {kind}",
            names,
            special("data", kind) if kind != "folder" else special("data/dataset_info.json", "folder"),
        )
    values: list[Any] = ["", " ", "null", "12", "[]", "{", "{}", '{"facts": 12}', '{"facts": null}',
            '{"facts": []}', '{"facts": "facts.json"}',
                         '{"facts": true}', '{"facts": {}}', '{"facts": {"file_name": 12}}',
                         '{"facts": {"file_name": null}}',
                         '{"facts": {"file_name": ["facts.json"]}}', '{"facts": {"file_name": ""}}', "NaN",
                         '{"facts": NaN}',
                         "[" * DEEP, '{"a":' * DEEP, f'{{"facts": {LONG}}}',
                         '{"facts": {"file_name": "facts.json"}} x', b"\xff\xfe",
                         b'{"facts": {"file_name": "f\xffacts.json"}}', '{"facts": {"file_name": "facts.json",}}',
                         "{'facts': 1}",
                         '{"fact": {"file_name": "facts.json"}}', '{"Facts": {"file_name": "facts.json"}}', "\0",
                         '{"facts\\u0000": 1}']  # fmt: skip
    for file in ("../facts.json", "/etc/passwd", "nowhere.json", ".", "..", "facts.JSONX", "facts.txt",
            "a\\u0000b.json", "\\ud800.json", "x" * 300 + ".json",
                 "x/" * 3000 + "f.json", "~/facts.json", "dataset_info.json/..", "//facts.json", "\\n", " ",
                 "file:///etc/passwd",
                 "http://127.0.0.1:9/x.json", "C:\\\\facts.json", "..\\\\facts.json", "$HOME/facts.json",
                 "facts.json\\u202e"):  # fmt: skip
        values.append(f'{{"facts": {{"file_name": "{file}"}}}}')
    for key, bad in (("formatting", ['"x"', "12", "null", "[]"]), ("columns", ['"x"', "12", "[]", '{"promt": "x"}',
            '{"prompt": 12}', '{"prompt": null}',
                     '{"prompt": ["a"]}', '{"prompt": "nobody"}', '{"response": "nobody"}', '{"history": "nobody"}',
                     '{"prompt": "\\u0000"}', '{"prompt": ""}']),
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
            if suffix == "json" or (good[at - 1 : at] not in (b"\n",) and good[at : at + 1] != b"\n"):
                found.append((f"cut after {at} bytes", good[:at]))
            found.append((f"byte ff at {at}", good[:at] + b"\xff" + good[at:]))
        for at in sorted(numbers.sample(range(1, len(good) - 4), 20)):
            found.append((f"NUL at {at}", good[:at] + b"\0" + good[at:]))
        deep = b"[" * DEEP + b"]" * DEEP
        for value in (b"NaN", b"Infinity", b"-Infinity", LONG.encode(), b"1e999", deep, b'{"a":' * DEEP,
                b"\xed\xa0\x80", b'"\\ud800"',
                      b'"a\\u0000b"', b"12", b"true", b"[]", b"{}", b"[1]", b"1.5", b"tru", b"'x'", b"undefined",
                      b"0x10", b"01", b"+1"):  # fmt: skip
            for column in (b"instruction", b"output", b"input", b"history", b"system"):
                row = b'{"instruction": "Say it.", "output": "It.", "input": "", "extra": 1'
                if column == b"history" and value == b"[]":
                    continue
                bad = row.replace(b'"' + column + b'": "Say it."', b"").replace(b'"' + column + b'": "It."', b"")
                bad = bad.replace(b"{,", b"{").replace(b", ,", b",") + b', "' + column + b'": ' + value + b"}"
                found.append(
                    (
                        f"{column.decode()} is {value[:20].decode(errors='replace')}",
                        b"[" + bad + b"]" if suffix == "json" else bad,
                    )
                )
    for suffix, found in files.items():
        for title, content in found:
            yield _data(f"{suffix}: {title}", content, suffix)
    shapes: dict[str, bytes] = {
        "nothing": b"", "white space": b" \n\n ", "[]": b"[]", "{}": b"{}", "null": b"null", "a number": b"7",
        "a text": b'"x"', "[1]": b"[1]", "[[]]": b"[[]]",
        "[null]": b"[null]", "an object of rows": b'{"rows": []}', "UTF-16": rows.decode().encode("utf-16"),
        "UTF-32": rows.decode().encode("utf-32"),
        "GBK": '[{"instruction": "你是谁", "output": "米赞"}]'.encode("gbk"), "a zip file": b"PK\x03\x04" + bytes(300),
        "a gzip file": b"\x1f\x8b" + bytes(range(256)),
        "parquet": b"PAR1" + bytes(300) + b"PAR1", "CSV": b"instruction,output\na,b\n", "noughts": bytes(10_000),
        "deep": b"[" * DEEP, "a comment": b"// x\n" + rows,
        "two arrays": rows + rows, "more behind": rows + b"x",
        "single quotes": b"[{'instruction': 'a', 'output': 'b'}]", "no columns": b'[{"q": "a", "a": "b"}]' * 1,
        "empty answers": b'[{"instruction": "a", "output": ""}]',
        "blank answers": b'[{"instruction": "a", "output": " \\n"}]',
        "no question": b'[{"instruction": "", "output": "b"}]',
        "one row for two": b'[{"instruction": "a", "output": "b"}]',
        "pairs of three": b'[{"instruction": "a", "output": "b", "history": [["a", "b", "c"]]}]',
        "pairs of numbers": b'[{"instruction": "a", "output": "b", "history": [[1, 2]]}]',
        "history is a text": b'[{"instruction": "a", "output": "b", "history": "x"}]',
        "200 MB in one text": b'[{"instruction": "' + b"x" * 200_000_000,
        "a surrogate's half": b'[{"instruction": "a\\ud83d", "output": "b"}]',
    }  # fmt: skip
    for title, content in shapes.items():
        yield _data(title, content, "json")


def _data(title: str, content: bytes, suffix: str) -> Case:
    def change(root: Path) -> None:
        (root / "data" / "facts.json").unlink()
        (root / "data" / f"facts.{suffix}").write_bytes(content)
        (root / "data" / "dataset_info.json").write_text(json.dumps({"facts": {"file_name": f"facts.{suffix}"}}))

    return Case("data", title, (f"facts.{suffix}", "test_size", "columns"), change, DATA)
