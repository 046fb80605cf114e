"""Table of row formats: the value of `formatting` in a registry entry -> what reads its rows. Add a format here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_assets.data.formats import alpaca
from finetune_assets.data.formats.conversation import Message, RowKey
from finetune_assets.data.registry import Columns


@dataclass(frozen=True)
class RowFormat:
    """Functions that read rows of one format.

    Attributes:
        to_messages: returns the conversation of a row; raises ValueError if the row is invalid.
        unmapped: returns (role, column) for each needed column that no row has.
        row_key: returns what identifies a row when two files are compared; raises TypeError if it cannot tell.
    """

    to_messages: Callable[[Any, Columns], list[Message]]
    unmapped: Callable[[Columns, set[str]], list[tuple[str, str]]]
    row_key: Callable[[Any, Columns], RowKey]


FORMATS: Mapping[str, RowFormat] = {
    "alpaca": RowFormat(alpaca.to_messages, alpaca.unmapped, alpaca.row_key),
}
