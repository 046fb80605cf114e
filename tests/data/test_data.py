"""Splits of registered files: what counts as the same data, what is held out, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_assets.data import snapshot
from finetune_assets.data.prepare import SPLITS, prepare
from finetune_assets.data.split import Row, split
from finetune_assets.recipe import DatasetSection
from finetune_assets.reporting.errors import BadInput
from finetune_assets.store.digests import DigestCache
from tests.conftest import rows

pytestmark = pytest.mark.fast


class Data:
    """A data folder, and the splits that `prepare` makes of it."""

    def __init__(self, folder: Path):
        self.folder = folder / "data"
        self.folder.mkdir()
        self.runs = 0
        self.register({"facts": {"file_name": "facts.json"}})

    def register(self, entries: Any) -> None:
        (self.folder / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")

    def write(self, content: Any, name: str = "facts.json", **dump: Any) -> None:
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, **dump)
        (self.folder / name).write_text(text, encoding="utf-8")

    def prepare(self, keep_order: bool = False, **section: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the metrics, and the text of each split."""
        self.runs += 1
        raw, out = self.folder.parent / f"raw{self.runs}", self.folder.parent / f"out{self.runs}"
        raw.mkdir()
        out.mkdir()
        dataset = DatasetSection(**{"dataset": ["facts"], "test_size": 2, **section})
        snapshot.take(self.folder, dataset.dataset, raw)
        facts = prepare(raw, dataset, out, keep_order=keep_order)
        return facts, {name: (out / f"{name}.jsonl").read_text(encoding="utf-8") for name in SPLITS}

    def complaint(self, **section: Any) -> str:
        with pytest.raises(BadInput) as caught:
            self.prepare(**section)
        return str(caught.value)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    folder = Data(tmp_path)
    folder.write(rows())
    return folder


def test_reformatting_reordering_and_json_lines_change_nothing(data: Data):
    _, before = data.prepare()
    data.write(list(reversed(rows())), indent=4)
    assert data.prepare()[1] == before
    data.register({"facts": {"file_name": "facts.jsonl"}})
    data.write("\n\n".join(json.dumps(row) for row in rows()), "facts.jsonl")
    assert data.prepare()[1] == before


def test_the_given_order_is_kept_when_asked_for(data: Data):
    _, before = data.prepare(keep_order=True)
    data.write(list(reversed(rows())))
    _, after = data.prepare(keep_order=True)
    assert before["train"].splitlines() == list(reversed(after["train"].splitlines()))
    numbers = [json.loads(line)["messages"][0]["content"] for line in before["train"].splitlines()]
    asked = [row["instruction"] for row in rows()]
    assert numbers == [text for text in asked if text in numbers]


def test_a_conversation_holds_system_history_question_and_answer(data: Data):
    row = {
        "instruction": "And now?",
        "input": "B & C",
        "output": "D",
        "system": "Be brief.",
        "history": [["Hello", "Hi"]],
    }
    data.write([*rows(2), row])
    _, splits = data.prepare(test_size=0)
    conversations = [json.loads(line)["messages"] for line in splits["train"].splitlines()]
    assert [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "And now?\nB & C"},
        {"role": "assistant", "content": "D"},
    ] in conversations


def test_renamed_columns_leave_the_others_as_they_are(data: Data):
    data.register({"facts": {"file_name": "facts.json", "columns": {"prompt": "q"}}})
    data.write([{"q": "Q1", "output": "A1", "history": [["Q0", "A0"]]}])
    _, splits = data.prepare(test_size=0)
    assert [turn["content"] for turn in json.loads(splits["train"])["messages"]] == ["Q0", "A0", "Q1", "A1"]


def test_duplicates_are_dropped_and_counted(data: Data):
    data.write([*rows(), *rows(3)])
    facts, splits = data.prepare()
    assert facts["duplicates_dropped"] == 3
    assert sum(len(text.splitlines()) for text in splits.values()) == 12


def test_each_data_set_gives_its_share_and_max_samples_limits_it(data: Data):
    data.register({"facts": {"file_name": "facts.json"}, "more": {"file_name": "more.json"}})
    data.write([{"instruction": f"More {n}", "output": "ok"} for n in range(40)], "more.json")
    facts, _ = data.prepare(dataset="facts,more", test_size=0.25, val_size=0.1, max_samples=20)
    assert facts["by_dataset"] == {
        "facts": {"train": 8, "validation": 1, "test": 3},
        "more": {"train": 13, "validation": 2, "test": 5},
    }


questions = st.lists(st.text(alphabet="abAB 是?", min_size=1, max_size=3), min_size=3, max_size=30)


@given(questions, st.floats(0, 0.4), st.floats(0, 0.4), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_no_question_is_in_two_splits_and_no_row_is_lost(asked: list[str], val: float, test: float, seed: int):
    all_rows = [
        Row("d", ({"role": "user", "content": text}, {"role": "assistant", "content": str(n)}))
        for n, text in enumerate(asked)
    ]
    parts = split(all_rows, val_size=val, test_size=test, seed=seed)
    asked_in = [{row.question for row in part} for part in (parts.train, parts.validation, parts.test)]
    assert not (asked_in[0] & asked_in[1] or asked_in[0] & asked_in[2] or asked_in[1] & asked_in[2])
    assert sorted(row.id for part in (parts.train, parts.validation, parts.test) for row in part) == sorted(
        row.id for row in all_rows
    )


def test_a_new_row_moves_hardly_any_other(data: Data):
    def train_ids(count: int) -> set[str]:
        data.write(rows(count))
        _, splits = data.prepare(test_size=0.2)
        return {json.loads(line)["id"] for line in splits["train"].splitlines()}

    before = train_ids(100)
    assert len(before - train_ids(101)) <= 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[\n  {"instruction": "a", "output": "b"},\n  {"instruction" "x"}\n]', "facts.json:3:18: not valid JSON"),
        ("[]", "facts.json: has no rows"),
        ("", "facts.json: is empty"),
        ("{}", "holds an object, not an array of rows"),
        (
            '[\n{"instruction": "a", "output": "b"},\n{"instruction": "a", "output": ""}]',
            "facts.json:3: the row has no answer",
        ),
        ('[{"instruction": " ", "output": "b"}]', "facts.json:1: the row has no question"),
        ('[{"instruction": 3, "output": "b"}]', "'instruction' is int, not text"),
        ('[{"instruction": "a", "output": "b", "history": [["x"]]}]', "not a [question, answer] pair"),
        ('[{"instruction": "a", "output": "b", "history": {}}]', "not a list of [question, answer] pairs"),
        ('["text"]', "the row is not an object with columns"),
    ],
)
def test_bad_files_are_explained(data: Data, content: str, words: str):
    data.write(content)
    assert words in data.complaint()


def test_a_mapping_that_names_no_column_says_which_there_are(data: Data):
    data.register({"facts": {"file_name": "facts.json", "columns": {"prompt": "instructions"}}})
    assert "'instructions', which no row has; did you mean 'instruction'?" in data.complaint()


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"fact": {"file_name": "facts.json"}}, "no data set 'facts'; did you mean 'fact'?"),
        ({"facts": {"file_name": "nope.json"}}, "nope.json: no such file"),
        ({"facts": {"file_name": "../../secret.json"}}, "leaves the data folder"),
        ({"facts": {"file_name": "facts.json", "colums": {}}}, "facts: colums: unknown key; did you mean 'columns'?"),
        ({"facts": {"file_name": "facts.json", "formatting": "alpacca"}}, "formatting"),
        ({"facts": {}}, "facts: file_name: missing"),
        ([], "must be an object"),
    ],
)
def test_bad_registries_are_explained(data: Data, entries: Any, words: str):
    data.register(entries)
    assert words in data.complaint()


def test_a_data_set_too_small_to_split(data: Data):
    data.write(rows(1))
    facts, _ = data.prepare(test_size=0.5)
    assert facts["rows"] == {"train": 1, "validation": 0, "test": 0}


def test_source_digests_change_with_bytes_and_mapping_only(data: Data, tmp_path: Path):
    cache = DigestCache(tmp_path / "cache" / "d.sqlite")
    first = snapshot.source_digests(data.folder, ["facts"], cache)
    data.register({"other": {"file_name": "other.json"}, "facts": {"file_name": "facts.json"}})
    assert snapshot.source_digests(data.folder, ["facts"], cache) == first
    data.register({"facts": {"file_name": "facts.json", "columns": {"query": "output"}}})
    assert snapshot.source_digests(data.folder, ["facts"], cache) != first
