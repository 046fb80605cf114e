"""Splits (train, validation, test) of validated conversations, made from a snapshot of raw files."""

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
SHOWN = 10  # problems listed for one file


def prepare(raw: Path, section: DatasetSection, out: Path, *, keep_order: bool = False) -> dict[str, Any]:
    """Write train.jsonl, validation.jsonl, test.jsonl and a registry of them; return the metrics of the manifest.

    Args:
        raw: a snapshot folder, written by data.snapshot.take.
        keep_order: keep the order of the files. Otherwise rows are sorted by content, so that a reordered file
            gives the same bytes.

    Raises:
        BadInput: a row is invalid (the message names file, line and column), or no row is left to train on.
    """
    names = list(json.loads((raw / REGISTRY).read_text(encoding="utf-8")))
    rows: list[Row] = []
    duplicates = 0
    seen: set[str] = set()
    for name, entry in load_entries(raw, names).items():
        own = _read(raw / entry.file_name, name, entry)
        if section.max_samples is not None:
            # chosen by content: with the first rows of a file the order of rows would matter
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
    # without the number of the copy: the user knows the file by its own name
    file_name = path.name.partition("-")[2]
    present = {column for _, row in numbered if isinstance(row, dict) for column in row}
    problems = [
        f"{file_name}: columns.{role} of {dataset!r} names the column {column!r}, which no row has"
        f"{did_you_mean(column, sorted(present))}"
        for role, column in (rules.unmapped(entry.columns, present) if present else [])
    ]
    rows: list[Row] = []
    for line, row in [] if problems else numbered:
        try:
            rows.append(Row(dataset, tuple(rules.to_messages(row, entry.columns))))
        except ValueError as error:
            problems.append(f"{file_name}:{line}: the row {error}")
    if problems:
        more = [f"... and {len(problems) - SHOWN} more like these"] if len(problems) > SHOWN else []
        raise BadInput(
            "\n".join([*problems[:SHOWN], *more]), f"fix these rows of the data set {dataset!r}, or remove them"
        )
    return rows


def _split_row(row: Row) -> SplitRow:
    messages = [{"role": message["role"], "content": message["content"]} for message in row.messages]
    return {"id": row.id, "dataset": row.dataset, "messages": messages}


def _write_registry(path: Path) -> None:
    """Write registry entries for the splits with LLaMA-Factory's keys, so that other tools can read the splits."""
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
