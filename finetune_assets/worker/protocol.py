"""The messages of a worker: events while it works, and one last message with its report or its failure."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from finetune_assets.reporting.errors import BadInput, FinetuneError, StepFailed
from finetune_assets.reporting.events import Event, Message, StepProgress, Validation


class Report(Event, frozen=True):
    """The last message of a worker that has done its task."""

    event: Literal["done"] = "done"
    report: Any


class Failure(Event, frozen=True):
    """The last message of a worker that has failed."""

    event: Literal["error"] = "error"
    kind: str
    message: str
    hint: str | None = None

    @classmethod
    def of(cls, error: FinetuneError) -> Failure:
        """Return the message that reports an error."""
        kind = BadInput if isinstance(error, BadInput) else StepFailed
        return cls(kind=kind.__name__, message=error.message, hint=error.hint)

    def as_error(self) -> FinetuneError:
        """Return the error that the message reports."""
        kind = BadInput if self.kind == BadInput.__name__ else StepFailed
        return kind(self.message, self.hint)


WorkerMessage = Message | StepProgress | Validation | Report | Failure
_READER: TypeAdapter[WorkerMessage] = TypeAdapter(Annotated[WorkerMessage, Field(discriminator="event")])


def read_message(payload: Any) -> WorkerMessage:
    """Return the message that a payload of Dagster Pipes holds.

    Raises:
        StepFailed: it holds none.
    """
    try:
        return _READER.validate_python(payload)
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise StepFailed(f"the worker process sent an invalid message: {reason}") from error
