"""Alpaca rows -> conversations.

The user's text is the prompt, then the query on a new line; history holds earlier [question, answer] pairs.
"""

from __future__ import annotations

from typing import Any, TypedDict

from finetune_assets.data.registry import Columns


class Message(TypedDict):
    role: str
    content: str


def to_messages(row: Any, columns: Columns) -> list[Message]:
    """The conversation of one row: system (if given), earlier turns, the question and its answer.

    Raises:
        ValueError: what is wrong with the row, in words, naming the column.
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
    if history in (None, ""):  # in a table, an empty cell
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
    """(role, column) for each needed column that no row has.

    The system, query and history columns may be absent, unless the registry names one of its own for them.
    """
    needed = {"prompt", "response"} | columns.model_fields_set
    return [
        (role, name)
        for role in Columns.model_fields
        if role in needed and (name := getattr(columns, role)) not in present
    ]


def _text(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{column!r} is {type(value).__name__}, not text")
    return value
