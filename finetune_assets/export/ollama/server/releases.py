"""Releases of Ollama, and the first ones with a changed behaviour."""

from __future__ import annotations

import re

Release = tuple[int, int, int]

KNOWS_HARMONY: Release = (0, 11, 0)  # renders gpt-oss models itself
CHOOSES: Release = (0, 30, 0)  # may render with the chat template of the GGUF file
COPIES: Release = (0, 31, 2)  # copies weights when it creates a model


def release(version: str | None) -> Release | None:
    """Parse 0.33.1-rc2 as (0, 33, 1). None without a version, and for a build from source, which reports 0.0.0."""
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", version or "")
    numbers = (int(match[1]), int(match[2]), int(match[3] or 0)) if match else (0, 0, 0)
    return numbers if any(numbers) else None
