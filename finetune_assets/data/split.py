"""Division of rows into train, validation and test, by content: the order of rows and files does not matter."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_assets.data.formats.conversation import Message
from finetune_assets.store.digests import digest_of


@dataclass(frozen=True)
class Row:
    """One conversation of one data set, identified by its content."""

    dataset: str
    messages: tuple[Message, ...]

    @property
    def id(self) -> str:
        """Digest of the messages."""
        return digest_of([dict(message) for message in self.messages])[:16]

    @property
    def question(self) -> str:
        """Text before the answer, without case, punctuation and spaces; rows that share it stay in one split."""
        text = "\n".join(message["content"] for message in self.messages[:-1] if message["role"] != "system")
        folded = unicodedata.normalize("NFKC", text).casefold()
        return "".join(char for char in folded if unicodedata.category(char)[0] in "LNS")


@dataclass(frozen=True)
class Splits:
    """Rows of each split."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]


def split(rows: Sequence[Row], *, val_size: float, test_size: float, seed: int) -> Splits:
    """Hold out the same share of each data set, all rows of a question together.

    Questions are ranked by the digest of their text and the seed. The first ones become the test split, the next ones
    the validation split. A row therefore keeps its split when other rows come and go, except near the border. Rows
    keep their order within a split.

    Args:
        val_size, test_size: below 1, a share of each data set; else a count of rows over all data sets.
    """
    by_question: dict[str, list[Row]] = {}
    for row in rows:
        by_question.setdefault(row.question, []).append(row)
    # a question of several data sets counts for the first of them
    groups: dict[str, list[list[Row]]] = {}
    for group in by_question.values():
        groups.setdefault(min(row.dataset for row in group), []).append(group)
    parts: dict[str, list[Row]] = {"test": [], "validation": [], "train": []}
    for members in groups.values():
        members.sort(key=lambda group: rank(group[0].question, seed))
        total = sum(len(group) for group in members)
        held_out = {
            "test": _count(test_size, total, len(rows)),
            "validation": _count(val_size, total, len(rows)),
            "train": total,
        }
        queue = iter(members)
        for name, size in held_out.items():
            taken = 0
            while taken < size and (group := next(queue, None)) is not None:
                parts[name] += group
                taken += len(group)
    position = {id(row): number for number, row in enumerate(rows)}
    for part in parts.values():
        part.sort(key=lambda row: position[id(row)])
    return Splits(parts["train"], parts["validation"], parts["test"])


def rank(text: str, seed: int) -> str:
    """Return a sort key that depends only on the text and the seed."""
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def _count(size: float, total: int, of: int) -> int:
    """Return how many of `total` rows to hold out: at least one if any are requested, and never all."""
    if size == 0 or total < 2:
        return 0
    share = size if size < 1 else size / of
    return min(max(1, round(share * total)), total - 1)
