"""Alpaca rows.

The question is the prompt, then the query on a new line. The history holds earlier [question, answer] pairs.
"""

from __future__ import annotations

import json
from typing import Any

from finetune_assets.data.formats.conversation import Message, RowKey
from finetune_assets.data.registry import Columns


def to_messages(row: Any, columns: Columns) -> list[Message]:
    """Return the conversation of one row: system prompt (if any), history, question and answer.

    Raises:
        ValueError: the row is invalid; the message names the column and follows the words "the row".
    """
    if not isinstance(row, dict):
        raise ValueError("is not an object with columns")
    system = _text(row, columns.system)
    prompt, query, response = (_text(row, name) for name in (columns.prompt, columns.query, columns.response))
    if not prompt.strip() and not query.strip():
        raise ValueError(f"has no question: {columns.prompt!r} and {columns.query!r} are empty")
    if not response.strip():
        raise ValueError(f"has no answer: {columns.response!r} is empty")
    messages = [Message(role="system", content=system)] if system else []
    history = row.get(columns.history)
    if history in (None, ""):  # an empty cell of a table
        history = []
    if not isinstance(history, list):
        raise ValueError(f"{columns.history!r} is not a list of [question, answer] pairs")
    for pair in history:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ValueError(f"{columns.history!r} has an item that is not a [question, answer] pair of texts")
        messages += [Message(role="user", content=pair[0]), Message(role="assistant", content=pair[1])]
    question = "\n".join(text for text in (prompt, query) if text)
    return [*messages, Message(role="user", content=question), Message(role="assistant", content=response)]


def unmapped(columns: Columns, present: set[str]) -> list[tuple[str, str]]:
    """Return (role, column) for each needed column that no row has.

    The system, query and history columns may be absent, unless the registry gives names for them.
    """
    needed = {"prompt", "response"} | columns.model_fields_set
    return [
        (role, name)
        for role in Columns.model_fields
        if role in needed and (name := getattr(columns, role)) not in present
    ]


def row_key(row: Any, columns: Columns) -> RowKey:
    """Return what identifies a row when two files are compared.

    Raises:
        TypeError: the row is not an object.
    """
    if not isinstance(row, dict):
        raise TypeError("the row is not an object")
    question = tuple(_cell(row.get(name)) for name in (columns.prompt, columns.query))
    others = tuple(_cell(row.get(name)) for name in (columns.response, columns.system, columns.history))
    return RowKey(question, question + others)


def _cell(value: Any) -> str | None:
    """Return a cell as text; an empty cell equals an absent one."""
    return (value if isinstance(value, str) else json.dumps(value)) if value else None


def _text(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{column!r} is {type(value).__name__}, not text")
    return value
