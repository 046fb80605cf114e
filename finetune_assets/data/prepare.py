"""A snapshot of raw files -> validated conversations, split into train, validation and test."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from finetune_assets.data.files.by_suffix import read_rows
from finetune_assets.data.formats.by_name import FORMATS
from finetune_assets.data.registry import REGISTRY, Entry, load_entries
from finetune_assets.data.rows import SplitRow, write_split
from finetune_assets.data.split import Row, Splits, rank, split
from finetune_assets.recipe import DatasetSection, did_you_mean
from finetune_assets.reporting.errors import BadInput

SPLITS = ("train", "validation", "test")
SHOWN = 10  # problems listed of one file; more say no more


def prepare(raw: Path, section: DatasetSection, out: Path, *, keep_order: bool = False) -> dict[str, Any]:
    """Write train.jsonl, validation.jsonl, test.jsonl and a registry of them; facts for the manifest.

    Args:
        raw: a snapshot folder (data.snapshot.take).
        keep_order: keep the rows as the files have them; otherwise they are ordered by content, so that a
            reordered file gives the same bytes.

    Raises:
        BadInput: rows that cannot be used, each with file, line and column name; too few rows to split.
    """
    names = list(json.loads((raw / REGISTRY).read_text(encoding="utf-8")))
    rows: list[Row] = []
    duplicates = 0
    seen: set[str] = set()
    for name, entry in load_entries(raw, names).items():
        own = _read(raw / entry.file_name, name, entry)
        if section.max_samples is not None:
            # a choice by content: the first rows of a file would make the order of rows matter
            kept = {id(row) for row in sorted(own, key=lambda row: rank(row.id, section.seed))[: section.max_samples]}
            own = [row for row in own if id(row) in kept]
        for row in own:
            duplicates += row.id in seen
            if row.id not in seen:
                seen.add(row.id)
                rows.append(row)
    if not keep_order:
        rows.sort(key=lambda row: row.id)
    parts = split(rows, val_size=section.val_size, test_size=section.test_size, seed=section.seed)
    if not parts.train:
        raise BadInput(
            f"no rows are left to train on ({len(rows)} in all)", "lower dataset.test_size and dataset.val_size"
        )
    for name in SPLITS:
        write_split(out / f"{name}.jsonl", map(_split_row, getattr(parts, name)))
    _write_registry(out / REGISTRY)
    return _facts(parts, duplicates)


def _read(path: Path, dataset: str, entry: Entry) -> list[Row]:
    numbered, rules = read_rows(path), FORMATS[entry.formatting]
    if not numbered:
        raise BadInput(f"{path}: has no rows", "a data set needs at least one row")
    # the copy's number is ours; the user knows the file by its own name
    shown = path.name.partition("-")[2]
    present = {column for _, row in numbered if isinstance(row, dict) for column in row}
    problems = [
        f"{shown}: columns.{role} of {dataset!r} names the column {column!r}, which no row has"
        f"{did_you_mean(column, sorted(present))}"
        for role, column in (rules.unmapped(entry.columns, present) if present else [])
    ]
    rows: list[Row] = []
    for line, row in [] if problems else numbered:
        try:
            rows.append(Row(dataset, tuple(rules.to_messages(row, entry.columns))))
        except ValueError as error:
            problems.append(f"{shown}:{line}: the row {error}")
    if problems:
        more = [f"... and {len(problems) - SHOWN} more like these"] if len(problems) > SHOWN else []
        raise BadInput(
            "\n".join([*problems[:SHOWN], *more]), f"mend the rows of the data set {dataset!r}, or take them out"
        )
    return rows


def _split_row(row: Row) -> SplitRow:
    messages = [{"role": message["role"], "content": message["content"]} for message in row.messages]
    return {"id": row.id, "dataset": row.dataset, "messages": messages}


def _write_registry(path: Path) -> None:
    """Registry entries for the splits, in LLaMA-Factory's words, so that other tools can read them."""
    entry = {
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }
    registry = {name: {"file_name": f"{name}.jsonl", **entry} for name in SPLITS}
    path.write_text(json.dumps(registry, indent=2) + "\n", encoding="utf-8")


def _facts(parts: Splits, duplicates: int) -> dict[str, Any]:
    counts = {name: Counter(row.dataset for row in getattr(parts, name)) for name in SPLITS}
    datasets = sorted({dataset for count in counts.values() for dataset in count})
    return {
        "rows": {name: count.total() for name, count in counts.items()},
        "by_dataset": {dataset: {name: counts[name][dataset] for name in SPLITS} for dataset in datasets},
        "duplicates_dropped": duplicates,
        "samples": [list(row.messages) for row in parts.train[:3]],
    }
