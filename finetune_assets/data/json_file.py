"""JSON and JSON Lines files of rows, with errors that say the line and the column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_assets.errors import BadInput


def read_text(path: Path) -> str:
    """The file's text, a byte order mark removed.

    Raises:
        BadInput: it is not there, cannot be read, or is not UTF-8.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise BadInput(f"{path}:{line}: not UTF-8 (byte {error.start})", "save the file as UTF-8") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        BadInput: as read_text, or not valid JSON (with line and column).
    """
    return _parse(read_text(path), path, 1)


def read_rows(path: Path) -> list[tuple[int, Any]]:
    """The rows of a JSON array, or of a JSON Lines file (.jsonl), each with the line that it begins in.

    Raises:
        BadInput: as read_json; no array; no rows.
    """
    text = read_text(path)
    if path.suffix == ".jsonl":
        rows = [(number, _parse(line, path, number)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        value = _parse(text, path, 1)
        if not isinstance(value, list):
            raise BadInput(f"{path}: holds {_kind(value)}, not an array of rows", "write the rows as [ {...}, {...} ]")
        rows = list(zip(_lines_of_elements(text), value, strict=True))
    if not rows:
        raise BadInput(f"{path}: has no rows", "a data set needs at least one row")
    return rows


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if not text.strip():
            raise BadInput(f"{path}: is empty", "a data set needs at least one row") from None
        line = first_line + error.lineno - 1
        raise BadInput(f"{path}:{line}:{error.colno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise BadInput(f"{path}: nested too deeply") from None


def _lines_of_elements(text: str) -> list[int]:
    """The line in which each element of the (valid) JSON array begins."""
    decoder, blank = json.JSONDecoder(), " \t\r\n"
    at, line, counted, lines = text.index("[") + 1, 1, 0, []
    while True:
        while text[at] in blank or text[at] == ",":
            at += 1
        if text[at] == "]":
            return lines
        line += text.count("\n", counted, at)
        counted = at
        lines.append(line)
        _, at = decoder.raw_decode(text, at)


def _kind(value: Any) -> str:
    names = {dict: "an object", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
