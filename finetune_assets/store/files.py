"""Writing, deleting and renaming of files that are whole or not there, whatever a crash interrupts."""

from __future__ import annotations

import os
import shutil
import tempfile
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


def discard(folder: Path) -> None:
    """Delete a folder as far as that can be done; of a link to one, the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path: Path, data: bytes, *, prefix: str | None = None) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    Args:
        prefix: begins the name of the file in the making, by which what a crash left is known; `.NAME-` if not given.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-" if prefix is None else prefix, dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
