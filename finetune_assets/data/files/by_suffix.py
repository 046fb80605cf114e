"""Table of data files: suffix -> what reads the rows of such a file. Add a kind of file here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune_assets.data.files.json_file import read_array, read_lines

NumberedRows = list[tuple[int, Any]]

READERS: Mapping[str, Callable[[Path], NumberedRows]] = {
    ".json": read_array,
    ".jsonl": read_lines,
}


def read_rows(path: Path) -> NumberedRows:
    """Return the rows of a data file, each with the line that it begins in.

    Raises:
        BadInput: the file cannot be read, or is not valid (with line and column).
    """
    return READERS[path.suffix](path)
