"""A job in a process of its own: a crash cannot take the caller down, and all memory is returned at the end.

    caller -> guard (own session, no terminal signals) -> worker (own process group)

The guard ends the worker's whole group when the caller cancels or dies; see `guard`. The worker is spoken to by
Dagster Pipes, over two pipes that it inherits: a worker that any Pipes client can start. POSIX only (Linux, macOS).
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
from typing import IO, Any

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

GRACE_SECONDS = 10.0
TAIL_LINES = 15

WORKER = (sys.executable, "-m", "finetune_assets.worker")
LESS_MEMORY = {
    "train": "halve train.per_device_train_batch_size and double train.gradient_accumulation_steps; "
    "train.disable_gradient_checkpointing: false takes far less memory",
    "evaluate": "lower evaluate.per_device_eval_batch_size",
    "merge": "the model must fit into memory once, in the precision of its weights",
    "imatrix": "the model must fit into memory once; or leave gguf.imatrix out",
    "prove": "make fewer or smaller gguf.types at a time",
}
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
"""What a worker is told of Dagster when there is no Dagster run."""


def run(
    job: dict[str, Any],
    progress: Progress,
    *,
    env: Mapping[str, str] | None = None,
    context: PipesContextData = NO_RUN,
    on_message: Callable[[PipesMessage], None] = lambda message: None,
    held: Sequence[int] = (),
    worker: Sequence[str] = WORKER,
    grace_seconds: float = GRACE_SECONDS,
) -> dict[str, Any]:
    """Do `job` in a child process and wait for it; the report is returned.

    Whatever ends the wait early (Ctrl-C, a terminated run, an exception out of `progress`) ends the child's whole
    process group first: TERM, `grace_seconds`, KILL. So does the death of this process, however it comes.

    Args:
        job: what to do; see `process.worker`.
        progress: is called with each event, in this thread.
        env: environment variables for the child, besides those of this process that it needs (`child_environment`).
        context: the Dagster run that the job is part of.
        on_message: is called with each other Pipes message (opened, log, closed, ...), in this thread.
        held: descriptors that stay open until everything of the child is gone, also if this process dies: of locks.
        worker: the command; it finds the job by the two environment variables of Dagster Pipes.

    Raises:
        BadInput, StepFailed: as raised in the child, or StepFailed when the child died without a word.
    """
    with contextlib.ExitStack() as stack:
        told: PipesContextData = {**context, "extras": {**context["extras"], "job": job}}
        context_end = _filled_pipe(json.dumps(told).encode())
        stack.callback(os.close, context_end)
        messages_end, messages_write = os.pipe()
        messages = stack.enter_context(os.fdopen(messages_end, encoding="utf-8"))
        at = {
            DAGSTER_PIPES_CONTEXT_ENV_VAR: {PipesDefaultContextLoader.FILE_PATH_KEY: f"/dev/fd/{context_end}"},
            DAGSTER_PIPES_MESSAGES_ENV_VAR: {PipesDefaultMessageWriter.FILE_PATH_KEY: f"/dev/fd/{messages_write}"},
        }
        try:
            child = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", str(Path(guard.__file__)), str(grace_seconds)),
                    *(f"{context_end},{messages_write}", *worker),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(context_end, messages_write, *held),
                start_new_session=True,
                env={
                    **child_environment.for_worker(trust=trusted(job)),
                    **(env or {}),
                    **{name: encode_param(where) for name, where in at.items()},
                },
            )
        finally:
            os.close(messages_write)  # only the child's copy is left: its end is ours too
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        reader = threading.Thread(target=_collect, args=(child, tail), daemon=True)
        reader.start()
        stack.callback(_end, child, grace_seconds)
        report: Report | None = None
        failure: Failure | None = None
        for message in _parse(messages):
            method, params = message["method"], message["params"] or {}
            if method != "report_custom_message":
                on_message(message)
                if method == "closed":
                    break
                continue
            event = read_message(params["payload"])
            if isinstance(event, Failure):
                failure = event
            elif isinstance(event, Report):
                report = event
            else:
                progress(event)
        try:
            status = child.wait(grace_seconds)
        except subprocess.TimeoutExpired:  # it has said all and does not end
            status = _end(child, grace_seconds)
        reader.join(timeout=5)
        if failure is not None:
            raise failure.as_error()
        if report is None:
            raise _unexplained(job["task"], status, tail)
        return report.report


def trusted(job: Mapping[str, Any]) -> bool:
    """Whether the recipe trusts the code of the model that the job is about."""
    return job.get("model", {}).get("trust_remote_code") is True


def _filled_pipe(content: bytes) -> int:
    """The reading end of a pipe that holds `content`: a file for the child that nobody has to delete."""
    reading, writing = os.pipe()

    def fill() -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "wb") as stream:
            stream.write(content)

    threading.Thread(target=fill, daemon=True).start()  # a pipe takes 64 KiB, a job may be longer
    return reading


def _parse(lines: IO[str]) -> Iterator[PipesMessage]:
    """The messages; a last line that a dying child did not finish is left out."""
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def _collect(child: subprocess.Popen[bytes], tail: deque[str]) -> None:
    """Keep the last lines of what the child's libraries print."""
    assert child.stdout is not None
    with child.stdout as output:
        for line in output:
            if text := line.decode(errors="replace").rstrip():
                tail.append(text[-300:])


def _end(child: subprocess.Popen[bytes], grace_seconds: float) -> int:
    """Close the lifeline and wait until the guard has put the group away; do its work should it fail."""
    assert child.stdin is not None
    child.stdin.close()
    try:
        return child.wait(grace_seconds + 5)
    except subprocess.TimeoutExpired:
        guard.signal_group(child.pid, signal.SIGKILL)  # the worker then gets its own parent-death signal
        return child.wait()


def _unexplained(task: str, status: int, tail: Sequence[str]) -> StepFailed:
    """The error of a child that said neither done nor why not."""
    number = -status if status < 0 else status - 128
    if number == signal.SIGKILL:
        return StepFailed(
            f"the process at work ({task}) was killed (SIGKILL), as the system does when memory runs out",
            f"free memory, or {LESS_MEMORY[task]}",
        )
    names = {member.value: member.name for member in signal.Signals}
    how = f"was ended by {names[number]}" if number in names else f"ended with exit code {status}"
    said = "\n  ".join(tail) if tail else "(nothing)"
    return StepFailed(f"the process at work ({task}) {how} and gave no reason; its last words:\n  {said}")
