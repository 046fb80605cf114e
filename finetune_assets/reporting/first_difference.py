"""The position at which two sequences begin to differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the first position that differs; the shorter length if one sequence begins with the other."""
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)
