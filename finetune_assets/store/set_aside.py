"""Renaming of what stands in the way: it is not the project's own, so it is never deleted."""

from __future__ import annotations

import os
from pathlib import Path

SET_ASIDE = "set-aside-"  # begins the new names


def set_aside(path: Path) -> None:
    """Rename a file or folder: neither swept nor taken for one of ours, whoever looks.

    Raises:
        OSError: it cannot be renamed.
    """
    place, number = path.with_name(f"{SET_ASIDE}{path.name}"), 1
    while os.path.lexists(place):
        number += 1
        place = path.with_name(f"{SET_ASIDE}{path.name}-{number}")
    path.rename(place)
