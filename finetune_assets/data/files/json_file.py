"""JSON and JSON Lines files of rows; errors name the line and the column."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_assets.inputs.json_text import Refused, parse_json
from finetune_assets.inputs.regular_files import read_utf8
from finetune_assets.reporting.errors import BadInput

REGISTRY_SIZE = 10_000_000  # bytes; an entry has about a hundred


def read_json(path: Path) -> Any:
    """Return the value in a JSON file that people write.

    Raises:
        BadInput: it cannot be read, is not UTF-8, is too large, or is not clean JSON.
    """
    return _parse(read_utf8(path, REGISTRY_SIZE), path, 1)


def read_array(path: Path) -> list[tuple[int, Any]]:
    """Return the elements of a JSON array, each with the line that it begins in.

    Raises:
        BadInput: as read_json; or it is not an array.
    """
    text = read_utf8(path)
    value = _parse(text, path, 1)
    if not isinstance(value, list):
        raise BadInput(f"{path}: holds {_kind(value)}, not an array of rows", "write the rows as [ {...}, {...} ]")
    return list(zip(_lines_of_elements(text), value, strict=True))


def read_lines(path: Path) -> list[tuple[int, Any]]:
    """Return the value in each line of a JSON Lines file that is not blank, with the line's number.

    Raises:
        BadInput: as read_json.
    """
    lines = enumerate(read_utf8(path).split("\n"), 1)
    return [(number, _parse(line, path, number)) for number, line in lines if line.strip()]


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return parse_json(text, clean=True)
    except json.JSONDecodeError as error:
        if not text.strip():
            raise BadInput(f"{path}: is empty", "a data set needs at least one row") from None
        line = first_line + error.lineno - 1
        raise BadInput(f"{path}:{line}:{error.colno}: not valid JSON: {error.msg}") from None
    except Refused as error:
        line = first_line if "\n" not in text else _line_of_refused(text)
        raise BadInput(f"{path}{f':{line}' if line else ''}: {error}") from None


def _line_of_refused(text: str) -> int | None:
    """Return the line in which the first refused row of an array begins; None if it cannot be found."""
    try:
        for line, element in _elements(text):
            try:
                parse_json(element, clean=True)
            except Refused:
                return line
    except (ValueError, IndexError, RecursionError):  # the refused row cannot be parsed at all
        pass
    return None


def _lines_of_elements(text: str) -> list[int]:
    """Return the line in which each element of a valid JSON array begins."""
    return [line for line, _ in _elements(text)]


def _elements(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line in which each element of a JSON array begins, and its text."""
    decoder, blank = json.JSONDecoder(), " \t\r\n"
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        while text[position] in blank or text[position] == ",":
            position += 1
        if text[position] == "]":
            return
        line += text.count("\n", counted, position)
        counted = position
        _, end = decoder.raw_decode(text, position)
        yield line, text[position:end]
        position = end


def _kind(value: Any) -> str:
    names = {dict: "an object", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
