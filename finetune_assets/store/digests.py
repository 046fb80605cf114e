"""Content digests of files and folders, remembered so that unchanged bytes are not read twice."""

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

FINE = 20_000_000  # ns: two ticks of a kernel's clock, by which files are dated
COARSE = 2_000_000_000  # the same where files are dated by whole seconds, or by every other one


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spare white space: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """sha256 (hex) of a JSON value's canonical form."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes, read in blocks.

    Raises:
        OSError: it cannot be read; the error names it.
    """
    with open_regular(path) as file:
        return _digest(file, path)


class DigestCache:
    """sha256 by inode, good for as long as a file's size and its times of modification and change stay as they were.

    By inode, so that a file keeps its digest when the staging folder around it is renamed. Nobody can set the time of
    change: an edit that keeps size and modification time is seen by it. So is a new hard link or mode: such a file is
    read once more. A digest taken within a tick of the last change is not remembered: a change in the same tick would
    leave all times as they are. The digests are in one sqlite file; without it files are read each time.

    Args:
        file: the sqlite file; None: every file is read again, as one that must be sure of its bytes wants it.
    """

    def __init__(self, file: Path | None):
        self._database = DigestDatabase(file) if file is not None else None
        self._known = self._database.read() if self._database is not None else {}

    def file(self, path: Path) -> str:
        """The file's sha256 (hex).

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
        """Wait until the files just written are old enough for their digests to be remembered."""
        if self._database is None:
            return
        now = time.time_ns()
        ages = [now - found.st_ctime_ns - _margin(found) for found in map(os.stat, filter(os.path.exists, paths))]
        time.sleep(min(max(0, -min(ages, default=0)), COARSE) / 1e9)


def digest_of_source(path: Path, digests: DigestCache) -> str:
    """The sha256 (hex) of a file that people or hubs gave us.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        return digests.file(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}", SEE_TO_IT) from None


def _stamp(found: os.stat_result) -> str:
    return f"{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"


def _margin(found: os.stat_result) -> int:
    """How far apart, in ns, two changes must be for the file system to date them differently."""
    return COARSE if found.st_ctime_ns % 10**9 == 0 else FINE


def _settled(found: os.stat_result, moment: int) -> bool:
    """Whether any change after `moment` gives a file other times. One dated in the future has to wait for that."""
    changed = found.st_ctime_ns
    if found.st_mtime_ns <= moment:  # later ones were set by hand
        changed = max(changed, found.st_mtime_ns)
    return changed + _margin(found) <= moment


def _digest(file: BufferedReader, path: Path) -> str:
    try:
        return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def files_below(folder: Path) -> dict[str, Path]:
    """Relative POSIX name -> path of every regular file below a folder, hidden ones left out, by name."""
    found = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    return dict(sorted(found.items()))


def digest_of_files(digests: Mapping[str, str]) -> str:
    """One digest for a set of named file digests."""
    return digest_of(dict(digests))
