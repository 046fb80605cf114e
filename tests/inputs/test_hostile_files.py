"""Wrong registries, rows and model folders: each is refused by name, at once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_assets.data.files.by_suffix import read_rows
from finetune_assets.data.prepare import prepare
from finetune_assets.data.snapshot import take
from finetune_assets.inputs.json_text import read_model_json
from finetune_assets.lineage.plan import make_plan, open_store
from finetune_assets.models.formats.safetensors import read_head
from finetune_assets.recipe.file import load_recipe
from finetune_assets.reporting.errors import BadInput, FinetuneError, StepFailed
from tests.conftest import MiniProject

pytestmark = pytest.mark.fast

SECONDS = 5
DEEP = "[" * 100_000 + "]" * 100_000
NINES = "9" * 5000
ENTRY = '{"facts": {"file_name": "facts.json"'
ROW = '{"instruction": "a", "output": "b"'

REGISTRIES: dict[str, tuple[str | bytes, str]] = {
    "deep": ('{"facts": ' + DEEP + "}", "dataset_info.json:1: nested too deeply"),
    "digits": (f'{{"facts": {NINES}}}', "a number of 5000 digits (limit 400)"),
    "nan": (ENTRY + ', "x": NaN}}', "NaN is not a JSON number"),
    "infinite": (ENTRY + ', "x": 1e999}}', "the number '1e999' is too large"),
    "twice": (ENTRY + "}, " + ENTRY[1:] + "}}", "the key 'facts' is given twice"),
    "surrogate": ('{"facts": {"file_name": "\\ud800.json"}}', "a text contains a lone surrogate"),
    "nul": ('{"facts": {"file_name": "a\\u0000.json"}}', "a text contains a NUL character: 'a\\x00.json'"),
    "raw_nul": (b'{"facts": {"file_name": "a\0.json"}}', "not valid JSON: Invalid control character"),
    "utf16": ("{}".encode("utf-16"), "not UTF-8 but UTF-16"),
    "empty": ("", "is empty"),
    "list": ("[]", "must be an object"),
    "null": ('{"facts": null}', "facts: "),
    "number": ('{"facts": {"file_name": 3}}', "file_name: input should be a valid string"),
    "long": (json.dumps({"facts": {"file_name": "x" * 5000}}), "should have at most 1000 characters"),
    "long_part": (json.dumps({"facts": {"file_name": "x" * 900}}), "cannot be read: File name too long"),
    "outside": ('{"facts": {"file_name": "/etc/passwd"}}', "leaves the data folder"),
    "folder": ('{"facts": {"file_name": "."}}', "is a folder, not a file"),
    "large": (b" " * 11_000_000, "(limit 10.0 MB)"),
}  # fmt: skip
ROWS: dict[str, tuple[str, str]] = {
    "deep": ("[\n" + ROW + ', "x": ' + DEEP + "}]", "nested too deeply"),
    "digits": ("[\n" + ROW + "},\n" + ROW + f', "x": {NINES}}}]', ": a number of 5000 digits"),
    "nan": ("[\n" + ROW + "},\n" + ROW + ', "x": NaN}]', ":3: NaN is not a JSON number"),
    "infinite": ("[\n" + ROW + "},\n" + ROW + ', "x": -Infinity}]', ":3: -Infinity is not a JSON number"),
    "too_large": ("[\n" + ROW + ', "x": 1e400}]', ":2: the number '1e400' is too large"),
    "twice": ("[\n" + ROW + ', "output": "c"}]', ":2: the key 'output' is given twice"),
    "surrogate": ('[\n{"instruction": "\\udc00", "output": "b"}]', ":2: a text contains a lone surrogate"),
    "nul": ('[\n\n{"instruction": "\\u0000", "output": "b"}]', ":3: a text contains a NUL character"),
    "nul_key": ('[\n\n{"instruction\\u0000": "x", "output": "b"}]', ":3: a text contains a NUL character"),
    "column": ('[{"instruction": 3, "output": "b"}]', ":1: the row 'instruction' is int, not text"),
}  # fmt: skip


def refusal(mini: MiniProject, also: Callable[[Path], object] = lambda folder: None) -> str:
    """Return the messages of a plan and of the step about the data folder."""
    recipe, out = load_recipe(mini.recipe_path()), mini.root / "out"
    (out / "raw").mkdir(parents=True)
    (out / "split").mkdir()
    began = time.monotonic()
    with pytest.raises(BadInput) as caught:
        make_plan(recipe, mini, open_store(mini))
        take(mini.root / "data", ["facts"], out / "raw")
        prepare(out / "raw", recipe.dataset, out / "split")
    assert time.monotonic() - began < SECONDS
    assert len(str(caught.value)) < 10_000
    return str(caught.value)


@pytest.mark.parametrize("kind", REGISTRIES)
def test_registries(mini: MiniProject, kind: str):
    content, words = REGISTRIES[kind]
    mini.empty_base()
    (mini.root / "data" / "dataset_info.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refusal(mini)
    assert (words in said and "dataset_info.json" in said) or (str(mini.root / "data") in said and words in said)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("lines", [False, True], ids=["json", "jsonl"])
def test_rows(mini: MiniProject, kind: str, lines: bool):
    content, words = ROWS[kind]
    mini.empty_base()
    name = "facts.jsonl" if lines else "facts.json"
    if lines:
        content, words = (
            content.strip().removeprefix("[").removesuffix("]").replace("},\n", "}\n"),
            words.split(": ")[-1],
        )
    (mini.root / "data" / name).write_text(content)
    (mini.root / "data" / "dataset_info.json").write_text(json.dumps({"facts": {"file_name": name}}))
    said = refusal(mini)
    assert words in said and name in said


def test_the_line_of_a_refused_row_in_json_lines(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text(ROW + "}\n" + ROW + ', "x": NaN}\n')
    with pytest.raises(BadInput, match=r"x.jsonl:2: NaN is not a JSON number"):
        read_rows(tmp_path / "x.jsonl")


def test_emoji_written_as_escapes_are_text(tmp_path: Path):
    (tmp_path / "x.json").write_text('[{"instruction": "\\ud83d\\ude00"}]')
    assert read_rows(tmp_path / "x.json") == [(1, {"instruction": "😀"})]


THINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "is a named pipe, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
    "folder": (lambda path: path.mkdir(), "is a folder, not a file"),
    "ring": (lambda path: path.symlink_to(path.name), ""),
    "gone": (lambda path: path.symlink_to("nowhere"), "is a link to nowhere, which does not exist"),
}


@pytest.mark.parametrize("kind", THINGS)
@pytest.mark.parametrize("name", ["data/dataset_info.json", "data/facts.json", "base/config.json",
                                  "base/tokenizer.json", "base/model.safetensors",
                                  "base/chat_template.jinja"])  # fmt: skip
def test_a_path_that_is_not_a_file_is_named(mini: MiniProject, kind: str, name: str):
    mini.empty_base()
    make, words = THINGS[kind]
    (mini.root / name).unlink(missing_ok=True)
    make(mini.root / name)
    said = refusal(mini)
    if (kind, name) == ("device", "data/facts.json"):
        words = "leaves the data folder"
    assert words in said or (kind == "gone" and "no such file" in said)
    assert Path(name).name in said or (kind == "gone" and "nowhere" in said)


def test_a_file_with_a_read_error_is_named(mini: MiniProject):
    """The system reports a regular file, and reading it fails."""
    mini.empty_base()
    (mini.root / "base" / "tokenizer.json").symlink_to("/proc/self/mem")
    assert "tokenizer.json: cannot be read: Input/output error" in refusal(mini)


@pytest.mark.parametrize("name", ["~", "/", "..", ".", "", "/usr", "/proc", "./data", "~nobody_of_this_name",
                                  "/dev/null", "x" * 5000, "./" + "x" * 300, "\0"])  # fmt: skip
def test_folders_that_are_not_a_model_are_not_searched(mini: MiniProject, name: str):
    recipe = load_recipe(mini.recipe_path())
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"model_name_or_path": name})})
    began = time.monotonic()
    with pytest.raises(BadInput, match=r"model\.model_name_or_path"):
        make_plan(recipe, mini, open_store(mini))
    assert time.monotonic() - began < 1


def test_subfolders_are_not_searched(mini: MiniProject, monkeypatch: pytest.MonkeyPatch):
    base = mini.empty_base()
    (base / "LICENSES").mkdir()
    recipe = load_recipe(mini.recipe_path())
    before = make_plan(recipe, mini, open_store(mini))["base_model"].wanted
    (base / "deep").mkdir()
    os.mkfifo(base / "deep" / "tokenizer.json")
    assert make_plan(recipe, mini, open_store(mini))["base_model"].wanted == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (DEEP, "nested too deeply"),
        (f'{{"a": {NINES}}}', "a number of 5000 digits"),
        ("[]", "is not a JSON object"),
        ("{", "not valid JSON"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_json_of_models(tmp_path: Path, content: str | bytes, words: str):
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput) as caught:
        read_model_json(path)
    assert str(path) in str(caught.value) and words in str(caught.value)


def test_json_that_models_really_have_is_accepted(tmp_path: Path):
    """Mamba 2's configuration has Infinity, vocabularies have a NUL character."""
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity], "\\u0000": 1}')
    assert read_model_json(tmp_path / "config.json")["\0"] == 1


def head(text: str, size: int | None = None) -> bytes:
    return (len(text) if size is None else size).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        head("{}", 2**63),
        head("{}", 10**10),
        head("[]"),
        head("null"),
        head(DEEP),
        head(f'{{"x": {NINES}}}'),
        head('{"x": 3}'),
        head('{"x": {"dtype": 3, "shape": [], "data_offsets": [0, 0]}}'),
        head('{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}'),
        head('{"x": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 0]}}'),
        head('{"x": {"dtype": "F32", "shape": [true], "data_offsets": [0, 0]}}'),
        head('{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}'),
        head('{"x": {"dtype": "F32", "shape": [1]}}'),
    ],
)
def test_heads_of_weights(tmp_path: Path, content: bytes):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(StepFailed, match="is not a safetensors file"):
        read_head(path)


def test_a_head_that_would_fill_the_memory_is_not_read(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(head("{}", 5 * 10**9))
        file.truncate(10**10)  # a hole: no disk is used
    with pytest.raises(FinetuneError, match="its header would have 5000000000 bytes"):
        read_head(path)


def test_many_unknown_data_sets_are_reported_at_once(mini: MiniProject):
    mini.empty_base()
    names = {f"data_set_{n}": {"file_name": "facts.json"} for n in range(5000)}
    (mini.root / "data" / "dataset_info.json").write_text(json.dumps(names))
    mini.edit(dataset={"dataset": [f"no_{n}" for n in range(900)]})
    assert "and perhaps more like these" in refusal(mini)
