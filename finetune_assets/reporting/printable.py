"""Text for people: no control characters in a terminal, sizes with units."""

from __future__ import annotations

import json
from typing import Any

KEPT = "\n\t"
# Characters that change the order of others or are invisible. U+200C and U+200D join letters and are kept.
DIRECTIONS = [0x061C, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF, 0x2028, 0x2029]


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


_CODES = [*range(0x20), *range(0x7F, 0xA0), *DIRECTIONS, *range(0xD800, 0xE000), *range(0xE0000, 0xE0080)]
_SHOWN = {code: _escape(code) for code in _CODES if chr(code) not in KEPT}
_IN_JSON = {code: json.dumps(chr(code))[1:-1] for code in _SHOWN if code >= 0x20} | {0x7F: "\\u007f"}


def printable(text: str) -> str:
    r"""Escape what controls a terminal (`\x1b`), except newlines and tabs.

    That is: control characters, characters that change the direction of writing, and lone surrogates, which cannot be
    encoded.
    """
    return text.translate(_SHOWN)


def printable_json(value: Any) -> str:
    """Return JSON text of the same value in which those characters are escaped."""
    return json.dumps(value, indent=2, ensure_ascii=False).translate(_IN_JSON)


def human_size(size: float) -> str:
    """Return a size in bytes with a decimal unit: `538.1 MB`."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
