"""Turn disk errors (full, read-only, permission) into actionable messages."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from finetune_assets.reporting.causes import causes
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.reporting.printable import human_size

FULL = (errno.ENOSPC, errno.EDQUOT)
# Libraries in other languages raise their own errors, which contain the system's message only.
FULL_WORDS = ("No space left on device", "Disk quota exceeded", "database or disk is full")
SQLITE_WORDS = ("disk I/O error",)  # sqlite says so as well when a full disk has no room for its lock file
NOTHING = 1_000_000  # bytes: with less free space, a full disk is the cause
READ_ONLY_WORDS = ("Read-only file system", "attempt to write a readonly database")


def disk_trouble(
    error: BaseException, folder: Path, *, setting: str = "DAGSTER_HOME", outcome: str = "nothing was published"
) -> StepFailed | None:
    """Return the failure for an error while writing below `folder`; None if the disk did not cause it.

    Args:
        setting: the environment variable that moves the folder.
        outcome: the state of the work, for the message.
    """
    if _matches(error, FULL, FULL_WORDS) or (_matches(error, (), SQLITE_WORDS) and free_bytes(folder) < NOTHING):
        return StepFailed(
            f"no space left on the disk of {folder} ({human_size(free_bytes(folder))} free); {outcome}",
            f"free some space, or set {setting} to a folder on a larger disk",
        )
    if _matches(error, (errno.EROFS,), READ_ONLY_WORDS):
        return StepFailed(
            f"the disk of {folder} is read-only; {outcome}",
            f"make it writable, or set {setting} to a folder on a different disk",
        )
    if isinstance(error, OSError):
        return StepFailed(f"{error.filename or folder}: {error.strerror or error}; {outcome}")
    return None


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist."""
    return shutil.disk_usage(_existing(folder)).free


def same_disk(one: Path, other: Path) -> bool:
    """Return whether two folders, which need not exist, are on the same disk."""
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _matches(error: BaseException | None, numbers: tuple[int, ...], words: tuple[str, ...]) -> bool:
    return any(
        (isinstance(link, OSError) and link.errno in numbers) or any(word in str(link) for word in words)
        for link in causes(error)
    )
