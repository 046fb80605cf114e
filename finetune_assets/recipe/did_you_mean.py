"""Suggestions for a name that is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LISTED = 40  # names shown where none is near
NEAR = 200  # names, and letters of a name, that are looked through for what was meant


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest of the `known` names, or all of them when none is near."""
    names = list(known)
    near = difflib.get_close_matches(word[:NEAR], names[:NEAR], n=1, cutoff=0.6)  # it takes their product's time
    more = ["..."] if len(names) > LISTED else []
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join([*names[:LISTED], *more])}"
