"""Content digests of files and folders, cached so that unchanged bytes are not read twice."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from finetune_assets.inputs.regular_files import SEE_TO_IT, open_regular
from finetune_assets.reporting.errors import BadInput
from finetune_assets.store.digest_database import DigestDatabase

FINE = 20_000_000  # ns: two ticks of the kernel's clock, which dates files
COARSE = 2_000_000_000  # ns: the same on file systems that date files in steps of one or two seconds


def canonical(value: Any) -> str:
    """Return JSON with sorted keys and no optional white space: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """Return the sha256 (hex) of a JSON value's canonical form."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes, read in blocks.

    Raises:
        OSError: it cannot be read; the error names it.
    """
    with open_regular(path) as file:
        return _digest(file, path)


class DigestCache:
    """The sha256 of files by inode, valid while a file's size and its times of modification and change stay the same.

    The key is the inode, so that a file keeps its digest when its staging folder is renamed. No program can set the
    time of change: it reveals an edit that keeps size and modification time. A new hard link or mode changes it too:
    such a file is read once more. A digest taken within a tick of the last change is not stored: a change in the same
    tick would leave all times unchanged. The digests are in one sqlite file; without it, files are read each time.

    Args:
        file: the sqlite file; None: read every file again, for callers that must be sure of its bytes.
    """

    def __init__(self, file: Path | None):
        self._database = DigestDatabase(file) if file is not None else None
        self._known = self._database.read() if self._database is not None else {}

    def file(self, path: Path) -> str:
        """Return the sha256 (hex) of a file.

        Raises:
            OSError: it cannot be read.
        """
        if self._database is None:
            return digest_of_file(path)
        with open_regular(path) as file:
            before, moment = os.fstat(file.fileno()), time.time_ns()
            inode, stamp = f"{before.st_dev}:{before.st_ino}", _stamp(before)
            known = self._known.get(inode)
            if known is not None and known[0] == stamp:
                return known[1]
            digest = _digest(file, path)
            if _stamp(os.fstat(file.fileno())) == stamp and _settled(before, moment):
                self._known[inode] = (stamp, digest)
                self._database.write(inode, stamp, digest)
            return digest

    def settle(self, paths: Iterable[Path]) -> None:
        """Wait until files that were just written are old enough for their digests to be stored."""
        if self._database is None:
            return
        now = time.time_ns()
        ages = [now - status.st_ctime_ns - _margin(status) for status in map(os.stat, filter(os.path.exists, paths))]
        time.sleep(min(max(0, -min(ages, default=0)), COARSE) / 1e9)


def digest_of_source(path: Path, digests: DigestCache) -> str:
    """Return the sha256 (hex) of a file that people or hubs provide.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        return digests.file(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}", SEE_TO_IT) from None


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def _margin(status: os.stat_result) -> int:
    """Return how many ns apart two changes must be for the file system to date them differently."""
    return COARSE if status.st_ctime_ns % 10**9 == 0 else FINE


def _settled(status: os.stat_result, moment: int) -> bool:
    """Return whether any change after `moment` gives a file different times; false while it is dated in the future."""
    changed = status.st_ctime_ns
    if status.st_mtime_ns <= moment:  # a later time was set by hand
        changed = max(changed, status.st_mtime_ns)
    return changed + _margin(status) <= moment


def _digest(file: BufferedReader, path: Path) -> str:
    try:
        return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def files_below(folder: Path) -> dict[str, Path]:
    """Return relative POSIX name -> path of every regular file below a folder, without hidden ones, sorted by name."""
    files = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    return dict(sorted(files.items()))


def digest_of_files(digests: Mapping[str, str]) -> str:
    """Return one digest for a set of named file digests."""
    return digest_of(dict(digests))
