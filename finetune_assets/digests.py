"""Content digests of files and folders, remembered so that unchanged bytes are not read twice."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spare white space: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """sha256 (hex) of a JSON value's canonical form."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class DigestCache:
    """sha256 by inode, good for as long as a file's size and modification time stay as they were.

    By inode, so that a file keeps its digest when the staging folder around it is renamed. The cache lives in one
    sqlite file. Losing it costs time only; when it cannot be written (a read-only disk) the digests are computed each
    time.

    Args:
        file: the sqlite file; None: every file is read again, as one that must be sure of its bytes wants it.
    """

    def __init__(self, file: Path | None):
        self._file = file
        self._seen: dict[str, tuple[str, str]] = {}
        if file is None:
            return
        try:
            with closing(_connect(file)) as db:
                self._seen = {key: (stamp, digest) for key, stamp, digest in db.execute("SELECT * FROM digests")}
        except (sqlite3.Error, OSError):
            pass

    def file(self, path: Path) -> str:
        """The file's sha256 (hex).

        Raises:
            OSError: it cannot be read.
        """
        stat = path.stat()
        key, stamp = f"{stat.st_dev}:{stat.st_ino}", f"{stat.st_size}:{stat.st_mtime_ns}"
        known = self._seen.get(key)
        if known is not None and known[0] == stamp:
            return known[1]
        digest = digest_of_file(path)
        if self._file is None:
            return digest
        self._seen[key] = (stamp, digest)
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with closing(_connect(self._file)) as db:
                db.execute("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", (key, stamp, digest))
        except (sqlite3.Error, OSError):
            pass
        return digest


def _connect(file: Path) -> sqlite3.Connection:
    db = sqlite3.connect(file, timeout=5, isolation_level=None)
    db.execute("PRAGMA synchronous=OFF")  # a digest lost in a crash is computed again
    db.execute("CREATE TABLE IF NOT EXISTS digests (inode TEXT PRIMARY KEY, stamp TEXT, digest TEXT)")
    return db


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
