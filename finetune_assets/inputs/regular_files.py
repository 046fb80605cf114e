"""Reading of files that people and hubs provide: regular files only, at most the expected bytes, without waiting.

Opening a named pipe would block, and a device may have no end. A path to a folder or a socket is a mistake.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from finetune_assets.reporting.errors import BadInput
from finetune_assets.reporting.printable import human_size

NO_FILE = "no such file"
SEE_TO_IT = "check its permissions, and the disk"
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def why_not_regular(path: Path) -> str | None:
    """Return why a path cannot be read as a file, such as `is a named pipe, not a file`; None if it can.

    The file is not opened.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            return f"is a link to {path.readlink()}, which does not exist"
        return NO_FILE
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError:
        return "no such file: the name contains a NUL character"
    return None if stat.S_ISREG(mode) else f"is {KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file"


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading; refuse a named pipe, device or folder at once.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(handle, "rb")


def read_regular(path: Path, limit: int | None = None) -> bytes:
    """Read a regular file.

    Args:
        limit: largest size in bytes; a larger file is refused.

    Raises:
        BadInput: the file is missing, unreadable, not a regular file, or larger than the limit.
    """
    if (why := why_not_regular(path)) is not None:
        raise BadInput(f"{path}: {why}")
    try:
        with open_regular(path) as file:  # it may have been replaced meanwhile
            status = os.fstat(file.fileno())
            if limit is None:
                return file.read()
            content = file.read(limit + 1)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}", SEE_TO_IT) from None
    if len(content) > limit:
        size = human_size(max(status.st_size, len(content)))
        raise BadInput(f"{path}: has {size} (limit {human_size(limit)})", "check that it is the right file")
    return content


def read_utf8(path: Path, limit: int | None = None) -> str:
    """Read a regular file as text, a byte order mark removed.

    Raises:
        BadInput: as read_regular, or the file is not UTF-8 (with the line).
    """
    raw = read_regular(path, limit)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        kind = " but UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise BadInput(f"{path}:{line}: not UTF-8{kind} (byte {error.start})", "save the file as UTF-8") from None
