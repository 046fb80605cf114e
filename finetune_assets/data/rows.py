"""Rows of a split: the one reader and the one writer of the files that `prepare` makes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict, TypeGuard

from finetune_assets.reporting.errors import BadInput, StepFailed


class SplitRow(TypedDict):
    """One row of a split.

    Attributes:
        id: digest of the messages.
        dataset: name of the data set that the row comes from.
        messages: the conversation, each turn with role and content; it ends with the answer to learn.
    """

    id: str
    dataset: str
    messages: list[dict[str, str]]


def read_split(path: Path, limit: int | None = None) -> list[SplitRow]:
    """Return the rows of a split, or the first `limit` of them.

    Raises:
        StepFailed: the file cannot be read.
        BadInput: a line is not a row (the message names file and line).
    """
    return [row for _, row in islice(numbered_rows(path), limit)]


def numbered_rows(path: Path) -> Iterator[tuple[int, SplitRow]]:
    """Yield each row of a split with its line number.

    Raises:
        StepFailed, BadInput: as read_split.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parse(line, f"{path.name}, line {number}")
    except OSError as error:
        raise StepFailed(f"{path}: {error.strerror}", "materialise dataset_info again") from error


def write_split(path: Path, rows: Iterable[SplitRow]) -> None:
    """Write rows as JSON Lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _parse(line: str, place: str) -> SplitRow:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{place}: not valid JSON: {error}") from error
    if not _is_row(row):
        raise BadInput(f'{place}: not a row of the form {{"id", "dataset", "messages": [{{role, content}}, ...]}}')
    return row


def _is_row(row: Any) -> TypeGuard[SplitRow]:
    return (
        isinstance(row, dict)
        and isinstance(row.get("id"), str)
        and isinstance(row.get("dataset"), str)
        and isinstance(row.get("messages"), list)
        and all(_is_message(message) for message in row["messages"])
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
