"""Write, delete and rename files so that a crash leaves each of them whole or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

SET_ASIDE = "set-aside-"  # prefix of the new names


def set_aside(path: Path) -> None:
    """Rename a foreign file or folder, so that it is neither deleted nor taken for an artifact.

    Raises:
        OSError: it cannot be renamed.
    """
    new, number = path.with_name(f"{SET_ASIDE}{path.name}"), 1
    while os.path.lexists(new):
        number += 1
        new = path.with_name(f"{SET_ASIDE}{path.name}-{number}")
    path.rename(new)


def discard(folder: Path) -> None:
    """Delete a folder as far as possible; delete only the link if it is one."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path: Path, data: bytes, *, prefix: str | None = None) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    Args:
        prefix: begins the name of the temporary file, by which one left by a crash is recognised; default: `.NAME-`.
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
