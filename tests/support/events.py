"""Events of a run as JSON, for tests that look at what crosses a pipe and is written to logs."""

from __future__ import annotations

from typing import Any

from finetune_assets.reporting.events import Progress


def json_into(events: list[dict[str, Any]]) -> Progress:
    """Return a progress function that appends the JSON form of each event to a list."""
    return lambda event: events.append(event.as_json())
