"""Rows of a matrix where they lie in a file: read into memory, written from it, copied to another file."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from finetune_assets.reporting.errors import StepFailed

# of a kernel or file system that cannot do what was asked for
CANNOT = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def create(path: Path, start: bytes, size: int) -> None:
    """A new file with these first bytes and room for `size`.

    Room that is set aside at once costs the kernel half of what finding it with each write does, and a disk that is too
    small says so (OSError) before anything is computed.
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
    """An open file's descriptor, the place of the first row's first byte, and the bytes of a row."""

    file: int
    begin: int
    size: int

    def read(self, first: int, into: memoryview) -> None:
        """Fill `into` with the rows from `first` on; StepFailed where the file ends before."""
        at = self.begin + first * self.size
        while len(into):
            if not (got := os.preadv(self.file, [into], at)):
                raise StepFailed("a file of weights ends before its tensors do", "fetch or make it again")
            into, at = into[got:], at + got

    def write(self, first: int, data: memoryview) -> None:
        """Write rows, the first of them in the place of row `first`."""
        at = self.begin + first * self.size
        while len(data):
            done = os.pwrite(self.file, data, at)
            data, at = data[done:], at + done

    def copy(self, first: int, last: int, to: Rows) -> None:
        """Copy the rows from `first` up to `last` to the same rows there; the kernel does it where it can."""
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
