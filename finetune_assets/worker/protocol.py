"""The messages on a worker's pipes: its task, progress events, and a last message with the report or the failure."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from finetune_assets.reporting.errors import BadInput, FinetuneError, StepFailed
from finetune_assets.reporting.events import Event, Message, StepProgress, Validation
from finetune_assets.worker.tasks.evaluate import Evaluate
from finetune_assets.worker.tasks.imatrix import Imatrix
from finetune_assets.worker.tasks.merge import Merge
from finetune_assets.worker.tasks.prove import Prove
from finetune_assets.worker.tasks.task import Task
from finetune_assets.worker.tasks.train import Train

T = TypeVar("T")


class Report(Event, frozen=True):
    """The last message of a worker that completed its task."""

    event: Literal["done"] = "done"
    report: Any


class Failure(Event, frozen=True):
    """The last message of a worker that failed."""

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
_MESSAGES: TypeAdapter[WorkerMessage] = TypeAdapter(Annotated[WorkerMessage, Field(discriminator="event")])
_TASKS: TypeAdapter[Task] = TypeAdapter(
    Annotated[Train | Evaluate | Merge | Imatrix | Prove, Field(discriminator="task")]
)


def read_task(job: Any) -> Task:
    """Return the task that a JSON object describes.

    Raises:
        StepFailed: the object is not a valid task.
    """
    return _read(_TASKS, job, "the worker process received an invalid task")


def read_message(payload: Any) -> WorkerMessage:
    """Return the message that a payload of Dagster Pipes holds.

    Raises:
        StepFailed: the payload is not a valid message.
    """
    return _read(_MESSAGES, payload, "the worker process sent an invalid message")


def _read(adapter: TypeAdapter[T], value: Any, what: str) -> T:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise StepFailed(f"{what}: {reason}") from error
