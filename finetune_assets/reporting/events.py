"""Events that work reports while it runs, and the watchers that receive them in the process that runs the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

from pydantic import BaseModel

from finetune_assets.reporting.masking import masked


class Event(BaseModel, frozen=True):
    """One thing that work reports. Its JSON form crosses the pipes of a worker and is written to training logs."""

    event: str

    def as_json(self) -> dict[str, Any]:
        """Return the fields that were given a value, the tag first."""
        return {"event": self.event, **self.figures()}

    def figures(self) -> dict[str, Any]:
        """Return the fields that were given a value, without the tag."""
        return self.model_dump(exclude={"event"}, exclude_unset=True)

    def masked(self) -> Self:
        """Return a copy without secrets in its texts."""
        return self.model_validate(masked(self.as_json()))


class Begin(Event, frozen=True):
    """The start of an asset's step."""

    event: Literal["begin"] = "begin"


class Message(Event, frozen=True):
    """A line of text for people."""

    event: Literal["message"] = "message"
    text: str


class StepProgress(Event, frozen=True):
    """Counted progress, with the figures that the work has; a field without a value is left out of the JSON form.

    Attributes:
        step, steps: units of work done, and all of them.
        what: the unit of work.
        seconds: since the work began.
        loss: in nats per learnt token.
        tokens: read since the work began.
    """

    event: Literal["step"] = "step"
    step: int
    steps: int
    what: str | None = None
    seconds: float | None = None
    epoch: float | None = None
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None


class Validation(Event, frozen=True):
    """A validation loss, in nats per learnt token."""

    event: Literal["validation"] = "validation"
    step: int
    epoch: float
    loss: float


class Done(Event, frozen=True):
    """The end of an asset's step.

    Attributes:
        reused: True if the artifact was published before.
    """

    event: Literal["done"] = "done"
    reused: bool


Progress = Callable[[Event], None]
Watcher = Callable[[str, Event], None]
_watchers: list[Watcher] = []


def silent(event: Event) -> None:
    """Ignore an event."""


def message(text: str) -> Message:
    """Return the event that reports a line of text."""
    return Message(text=text)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Call `watcher(asset, event)` for every event that is published while the context is open."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def publish(asset: str, event: Event) -> None:
    """Pass one event of an asset to every watcher, with its secrets masked."""
    for watcher in _watchers:
        watcher(asset, event.masked())
