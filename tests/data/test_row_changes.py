"""Descriptions of changed rows: whatever happens to a file, the description is true or absent."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_assets.data import row_changes, snapshot
from finetune_assets.data.row_changes import source_change, split_change
from tests.conftest import rows
from tests.support.training_fixtures import chat, write_rows

pytestmark = pytest.mark.fast

SAME = "the same rows, written differently"


def write(folder: Path, rows: Any, entry: dict[str, Any] | None = None, **dump: Any) -> Path:
    folder.mkdir(exist_ok=True)
    entry = {"file_name": "facts.json", **(entry or {})}
    if entry["file_name"].endswith(".jsonl"):
        text = "\n".join(json.dumps(row, **dump) for row in rows)
    else:
        text = json.dumps(rows, **dump)
    (folder / entry["file_name"]).write_text(text)
    (folder / "dataset_info.json").write_text(json.dumps({"facts": entry}))
    return folder


@pytest.fixture
def taken(tmp_path: Path) -> Path:
    """A snapshot of the twelve rows."""
    out = tmp_path / "snapshot"
    out.mkdir()
    snapshot.take(write(tmp_path / "then", rows()), ["facts"], out)
    return out


def change(taken: Path, *written: Any, **dump: Any) -> str | None:
    return source_change(taken, write(taken.parent / "now", *written, **dump), "facts")


def row(question: str, answer: str = "yes", **more: Any) -> dict[str, Any]:
    return {"instruction": question, "input": "", "output": answer, **more}


@pytest.mark.parametrize(
    ("edited", "words"),
    [
        ([*rows(), row("a"), row("b"), row("c")], "3 rows added"),
        ([*rows(), row("a")], "1 row added"),
        (rows()[2:], "2 rows removed"),
        ([{**rows()[0], "output": "Another."}, *rows()[1:]], "1 row changed"),
        ([row("a"), row("b"), row("Say the number 0."), *rows()[4:]], "2 rows added, 1 changed, 3 removed"),
        ([{**rows()[0], "history": [["a", "b"]]}, *rows()[1:]], "1 row changed"),
        ([{**rows()[0], "input": "In words."}, *rows()[1:]], "1 row added, 1 removed"),
        ([*rows(), rows()[0]], "1 row added"),
        ([*rows(), {**rows()[0], "output": "Another."}], "1 row added"),
        ([{key: value for key, value in item.items() if value} for item in rows()], SAME),
        ([{**item, "source": "a book"} for item in rows()], SAME),
        (list(reversed(rows())), SAME),
    ],
)
def test_rows(taken: Path, edited: list[dict[str, Any]], words: str):
    assert change(taken, edited) == words


def test_the_same_rows_written_otherwise(taken: Path):
    assert change(taken, rows(), indent=2) == SAME
    assert change(taken, rows(), ensure_ascii=False) == SAME
    assert change(taken, rows(), {"file_name": "facts.jsonl"}) == SAME
    assert change(taken, rows(), {"file_name": "elsewhere.json"}) is None, "the same bytes"


def test_keys_of_the_registry_entry(taken: Path):
    mapped = {"columns": {"prompt": "question", "response": "answer"}}
    keys = "columns.prompt, columns.response changed in dataset_info.json"
    renamed = [{"question": item["instruction"], "answer": item["output"]} for item in rows()]
    assert change(taken, rows(), {"columns": {"system": "persona"}}) == "columns.system changed in dataset_info.json"
    assert change(taken, rows(), {"columns": {"system": "system"}}) is None, "a default, spelt out"
    assert change(taken, renamed, mapped) == f"{keys}, {SAME}"
    assert change(taken, [*renamed, {"question": "a", "answer": "b"}], mapped) == f"{keys}, 1 row added"


@pytest.mark.parametrize("text", ["", "[", "{}", "3", "[1]", "[[]]", '["x"]', "[" * 100_000, "\udcff", "NaN", None])
def test_what_cannot_be_read_is_no_error(taken: Path, text: str | None):
    now = write(taken.parent / "now", rows())
    file = now / "facts.json"
    file.unlink() if text is None else file.write_bytes(text.encode(errors="surrogateescape"))
    assert source_change(taken, now, "facts") is None
    assert source_change(taken, now, "others") is None
    assert source_change(taken / "nowhere", now, "facts") is None
    assert split_change(taken / "nowhere", file) is None


def test_large_files_are_weighed(taken: Path, monkeypatch: pytest.MonkeyPatch):
    before = (taken / "00-facts.json").stat().st_size
    monkeypatch.setattr(row_changes, "LIMIT", 2 * before)
    words = change(taken, [*rows(), row("a")])
    assert words == f"{before} bytes -> {(taken.parent / 'now' / 'facts.json').stat().st_size} bytes"
    assert change(taken, rows()[::-1]) == SAME


def test_splits(tmp_path: Path):
    def split(name: str, pairs: list[tuple[str, str]]) -> Path:
        return write_rows(tmp_path / name, [chat(question, answer) for question, answer in pairs])

    before = split("a.jsonl", [("1", "a"), ("2", "b"), ("3", "c")])
    assert split_change(before, split("b.jsonl", [("1", "x"), ("3", "c"), ("4", "d"), ("5", "e")])) == (
        "2 rows added, 1 changed, 1 removed"
    )
    assert split_change(before, split("b.jsonl", [])) == "3 rows removed"
    assert split_change(before, before) is None


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_counts_add_up(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    """For any rows: after - before = added - removed, and the change back is described as the reverse."""
    folder = tmp_path_factory.mktemp("rows")
    some = st.lists(st.builds(row, st.sampled_from("abcd"), st.sampled_from("xyz")), min_size=1, max_size=8)
    before, after = data.draw(some), data.draw(some)
    (folder / "1").mkdir()
    (folder / "2").mkdir()
    snapshot.take(write(folder / "then", before), ["facts"], folder / "1")
    snapshot.take(write(folder / "now", random.sample(after, len(after))), ["facts"], folder / "2")
    there, back = (
        source_change(folder / name, folder / place, "facts") for name, place in (("1", "now"), ("2", "then"))
    )
    counts = [_counts(words) for words in (there, back)]
    assert counts[0]["added"] - counts[0]["removed"] == len(after) - len(before)
    assert (counts[1]["added"], counts[1]["removed"]) == (counts[0]["removed"], counts[0]["added"])
    assert counts[0]["changed"] == counts[1]["changed"]
    same = sorted(map(json.dumps, before)) == sorted(map(json.dumps, after))
    assert (sum(counts[0].values()) == 0) == same


def _counts(words: str | None) -> dict[str, int]:
    counts = {"added": 0, "changed": 0, "removed": 0}
    for part in words.replace(" rows", "").replace(" row", "").split(", ") if words and words != SAME else []:
        count, what = part.split()
        counts[what] = int(count)
    return counts
