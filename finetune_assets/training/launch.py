"""Training in a process of its own: a crash cannot take the caller down, and all memory is returned at the end.

    caller -> guard (own session, no terminal signals) -> worker (own process group)

The guard ends the worker's whole group when the caller cancels or dies; see `guard`. POSIX only (Linux, macOS).
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from finetune_assets.errors import BadInput, FinetuneError, StepFailed
from finetune_assets.training import guard

GRACE_SECONDS = 10.0
TAIL_LINES = 15

WORKER = (sys.executable, "-m", "finetune_assets.training.worker")


def run(
    job: dict[str, Any],
    progress: Callable[[dict[str, Any]], None],
    *,
    worker: Sequence[str] = WORKER,
    grace_seconds: float = GRACE_SECONDS,
) -> dict[str, Any]:
    """Do `job` in a child process and wait for it; the report is returned.

    Whatever ends the wait early (Ctrl-C, a terminated run, an exception out of `progress`) ends the child's whole
    process group first: TERM, `grace_seconds`, KILL. So does the death of this process, however it comes.

    Args:
        job: what to do; see `training.worker`.
        progress: is called with each event, in this thread.
        worker: the command; it gets the job's path and `--events-fd N` as arguments.

    Raises:
        BadInput, StepFailed: as raised in the child, or StepFailed when the child died without a word.
    """
    with contextlib.ExitStack() as stack:
        job_end = _filled_pipe(json.dumps(job).encode())
        stack.callback(os.close, job_end)
        events_end, events_write = os.pipe()
        events = stack.enter_context(os.fdopen(events_end, encoding="utf-8"))
        try:
            child = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", str(Path(guard.__file__)), str(grace_seconds)),
                    f"{job_end},{events_write}",
                    *(*worker, f"/dev/fd/{job_end}", "--events-fd", str(events_write)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(job_end, events_write),
                start_new_session=True,
            )
        finally:
            os.close(events_write)  # only the child's copy is left: its end is ours too
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        reader = threading.Thread(target=_collect, args=(child, tail), daemon=True)
        reader.start()
        stack.callback(_end, child, grace_seconds)
        report: dict[str, Any] | None = None
        for event in _parse(events):
            if event["event"] == "error":
                raise _as_exception(event)
            if event["event"] == "done":
                report = event["report"]
            else:
                progress(event)
        status = child.wait()
        reader.join(timeout=5)
        if report is None:
            raise _unexplained(status, tail)
        return report


def _filled_pipe(content: bytes) -> int:
    """The reading end of a pipe that holds `content`: a file for the child that nobody has to delete."""
    reading, writing = os.pipe()

    def fill() -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "wb") as stream:
            stream.write(content)

    threading.Thread(target=fill, daemon=True).start()  # a pipe takes 64 KiB, a job may be longer
    return reading


def _parse(lines: IO[str]) -> Iterator[dict[str, Any]]:
    """The events; a last line that a dying child did not finish is left out."""
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


def _end(child: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """Close the lifeline and wait until the guard has put the group away; do its work should it fail."""
    assert child.stdin is not None
    child.stdin.close()
    try:
        child.wait(grace_seconds + 5)
    except subprocess.TimeoutExpired:
        guard.signal_group(child.pid, signal.SIGKILL)  # the worker then gets its own parent-death signal
        child.wait()


def _as_exception(event: dict[str, Any]) -> FinetuneError:
    kind = BadInput if event["kind"] == "BadInput" else StepFailed
    return kind(event["message"], event.get("hint"))


def _unexplained(status: int, tail: Sequence[str]) -> StepFailed:
    """The error of a child that said neither done nor why not."""
    number = -status if status < 0 else status - 128
    if number == signal.SIGKILL:
        return StepFailed(
            "the training process was killed (SIGKILL), as the system does when memory runs out",
            "free memory, or halve train.per_device_train_batch_size and double train.gradient_accumulation_steps; "
            "train.disable_gradient_checkpointing: false takes far less memory",
        )
    names = {member.value: member.name for member in signal.Signals}
    how = f"was ended by {names[number]}" if number in names else f"ended with exit code {status}"
    said = "\n  ".join(tail) if tail else "(nothing)"
    return StepFailed(f"the training process {how} and gave no reason; its last words:\n  {said}")
