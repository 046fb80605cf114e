"""JSON within limits: refuses by name what Python's parser accepts and later steps cannot handle.

There are two levels. Other programs write a model's files (some contain Infinity, a vocabulary may contain NUL): these
must have no lone surrogates, and bounded size, depth and numbers. Registries and rows, which people write, must also
have no NUL characters, finite numbers only, and no key twice.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_assets.inputs.regular_files import read_utf8
from finetune_assets.reporting.errors import BadInput

DIGITS = 400  # of a number; a float has at most 309 before the decimal point
MODEL_FILE = 300_000_000  # bytes of a model's JSON file; the largest tokenizer.json has 35 million
SUSPECT = re.compile(r"\\u(?:d[89a-f]|0000)", re.IGNORECASE)  # escapes of surrogates (also paired ones) and NUL


class Refused(ValueError):
    """Valid JSON that is refused, with the reason."""


def parse_json(text: str, *, clean: bool) -> Any:
    """Parse a JSON text.

    Args:
        clean: also refuse non-finite numbers, keys given twice and NUL characters.

    Raises:
        json.JSONDecodeError: the text is not JSON.
        Refused: the text is JSON beyond the limits.
    """
    try:
        if clean:
            value = json.loads(
                text, parse_int=_whole, parse_float=_finite, parse_constant=_constant, object_pairs_hook=_once
            )
        else:
            value = json.loads(text, parse_int=_whole)
    except RecursionError:
        raise Refused("nested too deeply") from None
    if SUSPECT.search(text):
        for word in _texts(value):
            if clean and "\0" in word:
                raise Refused(f"a text contains a NUL character: {_shown(word)}")
            if any("\ud800" <= char <= "\udfff" for char in word):
                raise Refused(f"a text contains a lone surrogate: {_shown(word)}")
    return value


def read_model_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a model folder.

    Raises:
        BadInput: the file cannot be read, is too large, or is not an object.
    """
    try:
        value = parse_json(read_utf8(path, MODEL_FILE), clean=False)
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    except Refused as error:
        raise BadInput(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: is not a JSON object")
    return value


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise Refused(f"a number of {len(text)} digits (limit {DIGITS})")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Refused(f"the number {_shown(text)} is too large")
    return value


def _constant(text: str) -> float:
    raise Refused(f"{text} is not a JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        keys = [key for key, _ in pairs]
        raise Refused(f"the key {_shown(next(key for key in keys if keys.count(key) > 1))} is given twice")
    return unique


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a value, including keys."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            left += [*item, *item.values()]
        elif isinstance(item, list):
            left += item


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 60 else text[:57] + "...")
