"""Who watches a run: the command line's live display subscribes here, in the process that runs the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from finetune_assets.reporting.masking import masked

Event = dict[str, Any]
_watchers: list[Callable[[str, Event], None]] = []


@contextmanager
def watching(watcher: Callable[[str, Event], None]) -> Iterator[None]:
    """Call `watcher(asset, event)` for everything that steps tell while the context is open."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def tell(asset: str, event: Event) -> None:
    """Pass one event of an asset on. Events: begin, step, message, validation, done."""
    for watcher in _watchers:
        watcher(asset, masked(event))
