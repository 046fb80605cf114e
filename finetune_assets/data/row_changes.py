"""What changed in a data set, in words: rows added, changed and removed.

For people who read a plan, not for decisions: whatever cannot be compared is None, never an error.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

from finetune_assets.data.registry import REGISTRY, Columns, data_file, load_entries
from finetune_assets.reporting.errors import FinetuneError

LIMIT = 8_000_000  # bytes of both files together: a tenth of a second
TROUBLE = (FinetuneError, OSError, ValueError, TypeError, KeyError, RecursionError)

# What is asked in a row, and all that it says; two rows that ask the same are one row, changed.
Told = tuple[tuple[Hashable, ...], tuple[Hashable, ...]]


def source_change(snapshot: Path, folder: Path, name: str) -> str | None:
    """How a registered data set differs from its copy in a snapshot (data.snapshot.take).

    `3 rows added, 1 changed, 2 removed`; `the same rows, written differently`; the keys of its registry entry; sizes,
    where the files are too large to compare.
    """
    try:
        before, after = (load_entries(place, [name])[name] for place in (snapshot, folder))
        files = data_file(snapshot, before), data_file(folder, after)
        keys = _changed_keys(before.model_dump(exclude={"file_name"}), after.model_dump(exclude={"file_name"}))
        rows = _compare(*files, *(_alpaca(entry.columns) for entry in (before, after)))
    except TROUBLE:
        return None
    return (
        ", ".join([*([f"{', '.join(keys)} changed in {REGISTRY}"] if keys else []), *([rows] if rows else [])]) or None
    )


def split_change(before: Path, after: Path) -> str | None:
    """How the rows of a split (data.prepare) differ from those of an earlier one."""
    try:
        return _compare(before, after, _conversation, _conversation)
    except TROUBLE:
        return None


def _compare(before: Path, after: Path, told: Callable[[Any], Told], told_now: Callable[[Any], Told]) -> str | None:
    sizes = before.stat().st_size, after.stat().st_size
    if sum(sizes) > LIMIT:
        return f"{sizes[0]} bytes -> {sizes[1]} bytes" if sizes[0] != sizes[1] else None
    if before.read_bytes() == after.read_bytes():
        return None
    was, now = Counter(map(told, _rows(before))), Counter(map(told_now, _rows(after)))
    added, removed = (now - was).elements(), (was - now).elements()
    return _in_words(Counter[Hashable](asked for asked, _ in added), Counter[Hashable](asked for asked, _ in removed))


def _in_words(added: Counter[Hashable], removed: Counter[Hashable]) -> str:
    """Of what is asked in rows that are new, and in rows that are gone."""
    changed = (added & removed).total()
    counts = {"added": added.total() - changed, "changed": changed, "removed": removed.total() - changed}
    found = [(count, word) for word, count in counts.items() if count]
    if not found:
        return "the same rows, written differently"
    (first, word), *others = found
    return ", ".join([f"{first} row{'s' * (first > 1)} {word}", *(f"{count} {word}" for count, word in others)])


def _rows(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8-sig")
    rows = (
        [json.loads(line) for line in text.split("\n") if line.strip()] if path.suffix == ".jsonl" else json.loads(text)
    )
    if not isinstance(rows, list):
        raise TypeError("no array of rows")
    return rows


def _alpaca(columns: Columns) -> Callable[[Any], Told]:
    asked = (columns.prompt, columns.query)
    rest = (columns.response, columns.system, columns.history)

    def told(row: Any) -> Told:
        if not isinstance(row, dict):
            raise TypeError("a row is an object")
        question = tuple(_value(row.get(name)) for name in asked)
        return question, (*question, *(_value(row.get(name)) for name in rest))

    return told


def _value(cell: Any) -> str | None:
    """A cell that is empty is like one that is not there."""
    return (cell if isinstance(cell, str) else json.dumps(cell)) if cell else None


def _conversation(row: Any) -> Told:
    said = tuple((message["role"], message["content"]) for message in row["messages"])
    return said[:-1], said


def _changed_keys(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in sorted({*before, *after}):
        was, now = before.get(key), after.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            keys += _changed_keys(was, now, f"{prefix}{key}.")
        elif was != now:
            keys.append(f"{prefix}{key}")
    return keys
