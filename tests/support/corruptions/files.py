"""Harms of any published file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support.corruptions.harm import Harm


def cut(file: Path) -> None:
    """Drop the last tenth of a file."""
    with file.open("r+b") as data:
        data.truncate(file.stat().st_size * 9 // 10)


def flip(file: Path) -> None:
    """The last bit of a file."""
    with file.open("r+b") as data:
        data.seek(-1, 2)
        last = data.read(1)[0]
        data.seek(-1, 2)
        data.write(bytes([last ^ 1]))


PUBLISHED_HARMS: tuple[Harm[Callable[[Path], None]], ...] = (
    Harm("one bit flipped", "artifact", flip),
    Harm("cut at 90 %", "artifact", cut),
    Harm("a file gone", "artifact", Path.unlink),
)
