"""The sqlite file that stores digests. Losing it costs only time, so a damaged one is deleted."""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

from finetune_assets.store.files import set_aside

T = TypeVar("T")
PATIENCE = 1.0  # seconds to wait for a process that writes
# Not damage: a different process writes, or the disk is full or read-only. The file may be valid.
PASSING = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
}
BESIDE = ("-journal", "-wal", "-shm")  # files that sqlite writes next to a database
SHA256 = re.compile(r"[0-9a-f]{64}")
TABLE = "CREATE TABLE IF NOT EXISTS known (inode TEXT PRIMARY KEY, stamp TEXT, digest TEXT, seal TEXT)"


class Damaged(Exception):
    """A database with rows that this module did not write."""


class DigestDatabase:
    """Rows of inode, stamp and digest in one file. No method raises; a failed call reads or writes nothing."""

    def __init__(self, file: Path):
        self._file = file
        self._given_up = False

    def read(self) -> dict[str, tuple[str, str]]:
        """Return all rows: inode -> stamp and digest."""
        return self._attempt(self._rows) or {} if os.path.lexists(self._file) else {}

    def write(self, inode: str, stamp: str, digest: str) -> None:
        """Add a row, or replace the row of the same inode."""
        row = (inode, stamp, digest, _seal(inode, stamp, digest))
        if not self._given_up:
            self._attempt(lambda db: db.execute("INSERT OR REPLACE INTO known VALUES (?, ?, ?, ?)", row))

    def _rows(self, db: sqlite3.Connection) -> dict[str, tuple[str, str]]:
        rows: dict[str, tuple[str, str]] = {}
        for row in db.execute("SELECT inode, stamp, digest, seal FROM known"):
            if not all(isinstance(value, str) for value in row):
                raise Damaged
            inode, stamp, digest, seal = row
            if not SHA256.fullmatch(digest) or seal != _seal(inode, stamp, digest):
                raise Damaged
            rows[inode] = (stamp, digest)
        return rows

    def _attempt(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """Do some work on the database; if it is damaged, replace it and try once more."""
        for _ in range(2):
            try:
                with closing(self._connect()) as db:
                    return work(db)
            except sqlite3.Error as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF in PASSING:
                    break
                self._discard()
            except (Damaged, OSError, ValueError):  # ValueError: text that is not UTF-8
                self._discard()
        self._given_up = True  # every further attempt might wait as long
        return None

    def _connect(self) -> sqlite3.Connection:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(self._file) and not stat.S_ISREG(self._file.stat().st_mode):
            raise Damaged  # sqlite would wait for a fifo
        db = sqlite3.connect(self._file, timeout=PATIENCE, isolation_level=None)
        try:
            db.execute("PRAGMA synchronous=OFF")  # a digest lost in a crash is computed again
            db.execute(TABLE)
        except BaseException:
            db.close()
            raise
        return db

    def _discard(self) -> None:
        """Delete the database; rename a folder in its place, which may hold the user's files."""
        for path in (self._file, *(self._file.with_name(self._file.name + suffix) for suffix in BESIDE)):
            with suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    set_aside(path)
                else:
                    path.unlink(missing_ok=True)


def _seal(inode: str, stamp: str, digest: str) -> str:
    """Return a checksum of a row: without it, a flipped bit would give a wrong digest."""
    return hashlib.sha256(f"{inode} {stamp} {digest}".encode()).hexdigest()[:16]
