"""Rows of a matrix in a file: read into memory, written from memory, copied to another file."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from finetune_assets.reporting.errors import StepFailed

# errors of a kernel or file system that does not support a call
CANNOT = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def create(path: Path, start: bytes, size: int) -> None:
    """Create a file with these first bytes, and reserve `size` bytes for it.

    One reservation costs the kernel half of what growing the file with each write does. A disk that is too small raises
    OSError before anything is computed.
    """
    with path.open("wb") as file:
        file.write(start)
        file.flush()
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in CANNOT:
                raise


@dataclass(frozen=True)
class Rows:
    """The descriptor of an open file, the offset of its first row, and the size of a row in bytes."""

    file: int
    begin: int
    size: int

    def read(self, first: int, into: memoryview) -> None:
        """Fill `into` with the rows from `first` on; StepFailed if the file ends before that."""
        at = self.begin + first * self.size
        while len(into):
            if not (got := os.preadv(self.file, [into], at)):
                raise StepFailed("a file of weights ends before its tensors do", "fetch or make it again")
            into, at = into[got:], at + got

    def write(self, first: int, data: memoryview) -> None:
        """Write rows, beginning at row `first`."""
        at = self.begin + first * self.size
        while len(data):
            done = os.pwrite(self.file, data, at)
            data, at = data[done:], at + done

    def copy(self, first: int, last: int, to: Rows) -> None:
        """Copy the rows from `first` up to `last` to the same rows of another file, in the kernel where it can."""
        at, place, left = self.begin + first * self.size, to.begin + first * to.size, (last - first) * self.size
        while left and hasattr(os, "copy_file_range"):
            try:
                done = os.copy_file_range(self.file, to.file, left, at, place)
            except OSError as error:
                if error.errno in CANNOT:
                    break
                raise
            if not done:
                break
            at, place, left = at + done, place + done, left - done
        buffer = bytearray(min(left, 1 << 20))
        while left:
            part = memoryview(buffer)[: min(left, len(buffer))]
            Rows(self.file, at, 1).read(0, part)
            Rows(to.file, place, 1).write(0, part)
            at, place, left = at + len(part), place + len(part), left - len(part)
