"""Descriptions of how a data set changed: rows added, changed and removed.

They are shown in a plan and decide nothing: two files that cannot be compared give None, not an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

from finetune_assets.data.files.by_suffix import read_rows
from finetune_assets.data.formats.by_name import FORMATS
from finetune_assets.data.formats.conversation import RowKey
from finetune_assets.data.registry import REGISTRY, Entry, data_file, load_entries
from finetune_assets.data.rows import read_split
from finetune_assets.reporting.errors import FinetuneError

LIMIT = 8_000_000  # bytes of both files together, compared in less than a second
UNREADABLE = (FinetuneError, OSError, ValueError, TypeError, KeyError, RecursionError)

ReadKeys = Callable[[Path], Iterable[RowKey]]
Question = tuple[Hashable, ...]


def source_change(snapshot: Path, folder: Path, name: str) -> str | None:
    """Describe how a registered data set differs from its copy in a snapshot; None if nothing can be said.

    Examples: `3 rows added, 1 changed, 2 removed`; `the same rows, written differently`. Changed keys of the registry
    entry are named. Of files too large to compare, the sizes are given.
    """
    try:
        before, after = (load_entries(parent, [name])[name] for parent in (snapshot, folder))
        files = data_file(snapshot, before), data_file(folder, after)
        keys = _changed_keys(before.model_dump(exclude={"file_name"}), after.model_dump(exclude={"file_name"}))
        rows = _compare(*files, *(_source_keys(entry) for entry in (before, after)))
    except UNREADABLE:
        return None
    return (
        ", ".join([*([f"{', '.join(keys)} changed in {REGISTRY}"] if keys else []), *([rows] if rows else [])]) or None
    )


def split_change(before: Path, after: Path) -> str | None:
    """Describe how the rows of a split differ from those of an earlier one; None if nothing can be said."""
    try:
        return _compare(before, after, _split_keys, _split_keys)
    except UNREADABLE:
        return None


def _compare(before: Path, after: Path, read_before: ReadKeys, read_after: ReadKeys) -> str | None:
    sizes = before.stat().st_size, after.stat().st_size
    if sum(sizes) > LIMIT:
        return f"{sizes[0]} bytes -> {sizes[1]} bytes" if sizes[0] != sizes[1] else None
    if before.read_bytes() == after.read_bytes():
        return None
    was, now = Counter(read_before(before)), Counter(read_after(after))
    added, removed = (now - was).elements(), (was - now).elements()
    return _describe(Counter(key.question for key in added), Counter(key.question for key in removed))


def _describe(added: Counter[Question], removed: Counter[Question]) -> str:
    """Describe a change, given the questions of the rows added and of the rows removed."""
    changed = (added & removed).total()
    counts = {"added": added.total() - changed, "changed": changed, "removed": removed.total() - changed}
    changes = [(count, word) for word, count in counts.items() if count]
    if not changes:
        return "the same rows, written differently"
    (first, word), *others = changes
    return ", ".join([f"{first} row{'s' * (first > 1)} {word}", *(f"{count} {word}" for count, word in others)])


def _source_keys(entry: Entry) -> ReadKeys:
    rules = FORMATS[entry.formatting]
    return lambda path: [rules.row_key(row, entry.columns) for _, row in read_rows(path)]


def _split_keys(path: Path) -> list[RowKey]:
    turns = [tuple((message["role"], message["content"]) for message in row["messages"]) for row in read_split(path)]
    return [RowKey(row[:-1], row) for row in turns]


def _changed_keys(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in sorted({*before, *after}):
        was, now = before.get(key), after.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            keys += _changed_keys(was, now, f"{prefix}{key}.")
        elif was != now:
            keys.append(f"{prefix}{key}")
    return keys
