"""The normal form of a row: a conversation, whatever format its file has."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple, TypedDict


class Message(TypedDict):
    """One turn of a conversation.

    Attributes:
        role: system, user or assistant.
    """

    role: str
    content: str


class RowKey(NamedTuple):
    """Identity of a row for comparing files: rows with the same question are one row, changed if the content differs.

    Attributes:
        question: everything before the answer.
        content: everything in the row, the question included.
    """

    question: tuple[Hashable, ...]
    content: tuple[Hashable, ...]
