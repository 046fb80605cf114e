"""Disk trouble in words: full, read-only, not ours."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from finetune_assets.reporting.causes import causes
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.reporting.printable import human_size

FULL = (errno.ENOSPC, errno.EDQUOT)
# Libraries written in other languages raise errors of their own, which carry the system's words only.
FULL_WORDS = ("No space left on device", "Disk quota exceeded", "database or disk is full")
SQLITE_WORDS = ("disk I/O error",)  # also of a disk so full that it cannot make its lock file
NOTHING = 1_000_000  # bytes free, or fewer: then that is why
READ_ONLY_WORDS = ("Read-only file system", "attempt to write a readonly database")


def disk_trouble(
    error: BaseException, folder: Path, *, setting: str = "DAGSTER_HOME", outcome: str = "nothing was published"
) -> StepFailed | None:
    """The failure to report for an error met while writing below `folder`, or None if the disk is not to blame.

    Args:
        setting: the environment variable that puts the folder elsewhere.
        outcome: what became of the work.
    """
    if _says(error, FULL, FULL_WORDS) or (_says(error, (), SQLITE_WORDS) and free_bytes(folder) < NOTHING):
        return StepFailed(
            f"no space left on the disk of {folder} ({human_size(free_bytes(folder))} free); {outcome}",
            f"free some space, or set {setting} to a folder on a larger disk",
        )
    if _says(error, (errno.EROFS,), READ_ONLY_WORDS):
        return StepFailed(
            f"the disk of {folder} is read-only; {outcome}",
            f"make it writable, or set {setting} to a folder on another disk",
        )
    if isinstance(error, OSError):
        return StepFailed(f"{error.filename or folder}: {error.strerror or error}; {outcome}")
    return None


def free_bytes(folder: Path) -> int:
    """What is free on the disk of a folder that may not be there yet."""
    return shutil.disk_usage(_existing(folder)).free


def same_disk(one: Path, other: Path) -> bool:
    """Whether two folders, which may not be there yet, share the space that is free."""
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _says(error: BaseException | None, numbers: tuple[int, ...], words: tuple[str, ...]) -> bool:
    return any(
        (isinstance(met, OSError) and met.errno in numbers) or any(word in str(met) for word in words)
        for met in causes(error)
    )
