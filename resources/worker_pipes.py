"""Heavy work of a Dagster step in its own process, through a Dagster Pipes session.

Dagster's PipesSubprocessClient interrupts only the direct child, and leaves it alive if it ignores that. So
`worker.launch` starts and ends the child, with every process that it started, inside the session.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import dagster as dg
from dagster_pipes import PipesContextData, PipesParams

from finetune_assets.reporting.events import Progress
from finetune_assets.worker import launch
from finetune_assets.worker.tasks.task import Task
from resources.gpu import Lease


class CarriedByLaunch(dg.PipesContextInjector, dg.PipesMessageReader):
    """An injector and reader that do nothing: `launch` carries context and messages over its own pipes."""

    @contextmanager
    def inject_context(self, context_data: PipesContextData) -> Iterator[PipesParams]:
        yield {}

    @contextmanager
    def read_messages(self, handler: dg.PipesMessageHandler) -> Iterator[PipesParams]:
        yield {}

    def no_messages_debug_text(self) -> str:
        return "Context and messages go over pipes that the process inherits."


def run_worker(
    context: dg.AssetExecutionContext,
    task: Task,
    progress: Progress,
    *,
    lease: Lease,
    worker: Sequence[str] = launch.WORKER,
    grace_seconds: float = launch.GRACE_SECONDS,
) -> dict[str, Any]:
    """Run a task on the leased device in a child of this step, whose log lines reach Dagster's log at once.

    Raises:
        BadInput, StepFailed: as `launch.run`.
    """
    carried = CarriedByLaunch()
    with dg.open_pipes_session(context, carried, carried) as session:
        return launch.run(
            task,
            progress,
            env=lease.environment,
            held=[lease.lock],
            context=session.context_data,
            on_message=session.message_handler.handle_message,
            worker=worker,
            grace_seconds=grace_seconds,
        )
