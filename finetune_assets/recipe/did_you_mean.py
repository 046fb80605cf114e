"""Suggestions for a name that is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LISTED = 40  # names listed when none is near
NEAR = 200  # names, and characters of a name, that are compared: the time grows with their product


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the nearest known name, or a list of the known names when none is near."""
    names = list(known)
    near = difflib.get_close_matches(word[:NEAR], names[:NEAR], n=1, cutoff=0.6)
    more = ["..."] if len(names) > LISTED else []
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join([*names[:LISTED], *more])}"
