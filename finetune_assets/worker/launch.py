"""The launcher of a worker process: a crash does not end the caller, and all memory is released at the end.

    caller -> guard (own session, no terminal signals) -> worker (own process group)

The guard ends the worker's whole group when the caller cancels or dies; see `guard`. Launcher and worker
communicate by Dagster Pipes over two inherited pipes, so any Pipes client can start a worker. POSIX only: Linux, macOS.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from dagster_pipes import (
    DAGSTER_PIPES_CONTEXT_ENV_VAR,
    DAGSTER_PIPES_MESSAGES_ENV_VAR,
    PipesContextData,
    PipesDefaultContextLoader,
    PipesDefaultMessageWriter,
    PipesMessage,
    encode_param,
)

from finetune_assets.machine import child_environment
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.reporting.events import Progress
from finetune_assets.worker import guard
from finetune_assets.worker.protocol import Failure, Report, read_message
from finetune_assets.worker.tasks.task import Task

GRACE_SECONDS = 10.0
TAIL_LINES = 15

WORKER = (sys.executable, "-m", "finetune_assets.worker")
NO_RUN = PipesContextData(
    asset_keys=None,
    code_version_by_asset_key=None,
    provenance_by_asset_key=None,
    partition_key=None,
    partition_key_range=None,
    partition_time_window=None,
    run_id="",
    job_name=None,
    retry_number=0,
    extras={},
)
"""The Pipes context of a worker without a Dagster run."""


def run(
    task: Task,
    progress: Progress,
    *,
    env: Mapping[str, str] | None = None,
    context: PipesContextData = NO_RUN,
    on_message: Callable[[PipesMessage], None] = lambda message: None,
    held: Sequence[int] = (),
    worker: Sequence[str] = WORKER,
    grace_seconds: float = GRACE_SECONDS,
) -> dict[str, Any]:
    """Do a task in a child process, wait for it and return its report.

    Whatever ends the wait early (Ctrl-C, a terminated run, an exception out of `progress`) ends the child's whole
    process group first: TERM, `grace_seconds`, KILL. The death of this process has the same effect, whatever its cause.

    Args:
        progress: is called with each event, in this thread.
        env: more environment variables for the child, besides those that it takes from this process
            (`child_environment`).
        context: the Dagster run that the task is part of.
        on_message: is called with each other Pipes message (opened, log, closed, ...), in this thread.
        held: descriptors of locks; they stay open until every process of the child has ended, even if this one dies.
        worker: the command; the two environment variables of Dagster Pipes tell it where to read the task.

    Raises:
        BadInput, StepFailed: as raised in the child, or StepFailed when the child ended without a report.
    """
    with Child(task, worker, grace_seconds) as child:
        child.start(env or {}, context, held)
        outcome = child.listen(progress, on_message)
        status = child.wait()
    if isinstance(outcome, Failure):
        raise outcome.as_error()
    if outcome is None:
        raise child.unexplained(status)
    return outcome.report


class Child:
    """A worker process with its guard; a context manager that ends all processes of the child when it closes."""

    def __init__(self, task: Task, worker: Sequence[str], grace_seconds: float):
        self._task = task
        self._worker = worker
        self._grace_seconds = grace_seconds
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)  # the last output of the child's libraries
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def start(self, env: Mapping[str, str], context: PipesContextData, held: Sequence[int]) -> None:
        """Start the guard, which starts the worker; see `run` for the arguments."""
        job = self._task.model_dump(mode="json")
        extended: PipesContextData = {**context, "extras": {**context["extras"], "job": job}}
        context_end = _filled_pipe(json.dumps(extended).encode())
        self._stack.callback(os.close, context_end)
        messages_end, messages_write = os.pipe()
        self._messages = self._stack.enter_context(os.fdopen(messages_end, encoding="utf-8"))
        paths = {
            DAGSTER_PIPES_CONTEXT_ENV_VAR: {PipesDefaultContextLoader.FILE_PATH_KEY: f"/dev/fd/{context_end}"},
            DAGSTER_PIPES_MESSAGES_ENV_VAR: {PipesDefaultMessageWriter.FILE_PATH_KEY: f"/dev/fd/{messages_write}"},
        }
        own = child_environment.for_worker(trust=self._task.model.trust_remote_code)
        try:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", str(Path(guard.__file__)), str(self._grace_seconds)),
                    *(f"{context_end},{messages_write}", *self._worker),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(context_end, messages_write, *held),
                start_new_session=True,
                env={**own, **env, **{name: encode_param(path) for name, path in paths.items()}},
            )
        finally:
            os.close(messages_write)  # only the child's copy stays open: when it closes, reading ends
        self._reader = threading.Thread(target=self._collect, daemon=True)
        self._reader.start()
        self._stack.callback(self._end)

    def listen(self, progress: Progress, on_message: Callable[[PipesMessage], None]) -> Report | Failure | None:
        """Pass messages on until the last one; return the outcome, or None if the child ended without one."""
        outcome: Report | Failure | None = None
        for message in _parse(self._messages):
            if message["method"] != "report_custom_message":
                on_message(message)
                if message["method"] == "closed":
                    break
                continue
            event = read_message((message["params"] or {})["payload"])
            if not isinstance(event, Report | Failure):
                progress(event)
            elif not isinstance(outcome, Failure):
                outcome = event
        return outcome

    def wait(self) -> int:
        """Return the exit status of a child that has sent its last message; end the child if it keeps running."""
        try:
            status = self._process.wait(self._grace_seconds)
        except subprocess.TimeoutExpired:
            status = self._end()
        self._reader.join(timeout=5)
        return status

    def unexplained(self, status: int) -> StepFailed:
        """Return the error of a child that reported neither success nor failure."""
        work = f"the worker process ({self._task.task})"
        number = -status if status < 0 else status - 128
        if number == signal.SIGKILL:
            return StepFailed(
                f"{work} was killed (SIGKILL): this happens when memory runs out",
                f"free memory, or {self._task.less_memory}",
            )
        names = {member.value: member.name for member in signal.Signals}
        how = f"was ended by {names[number]}" if number in names else f"ended with exit code {status}"
        output = "\n  ".join(self._tail) or "(nothing)"
        return StepFailed(f"{work} {how} and gave no reason; its last output:\n  {output}")

    def _collect(self) -> None:
        """Keep the last lines of what the child's libraries print."""
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                if text := line.decode(errors="replace").rstrip():
                    self._tail.append(text[-300:])

    def _end(self) -> int:
        """Close the lifeline and wait until the guard has ended the group; if the guard hangs, kill it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            return self._process.wait(self._grace_seconds + 5)
        except subprocess.TimeoutExpired:
            guard.signal_group(self._process.pid, signal.SIGKILL)  # the worker then gets its own parent-death signal
            return self._process.wait()


def _filled_pipe(content: bytes) -> int:
    """Return the reading end of a pipe that holds `content`: a file for the child that needs no clean-up."""
    reading, writing = os.pipe()

    def fill() -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "wb") as stream:
            stream.write(content)

    threading.Thread(target=fill, daemon=True).start()  # a pipe holds 64 KiB, and a job may be longer
    return reading


def _parse(lines: IO[str]) -> Iterator[PipesMessage]:
    """Yield the messages; skip a last line that a dying child did not finish."""
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)
