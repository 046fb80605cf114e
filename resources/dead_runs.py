"""Runs whose process is gone: they end as failed, and their slots are free again.

A run that was killed says nothing any more. Dagster's monitoring asks launchers, and the default launcher cannot tell;
a run of the command line has no launcher at all. So every run carries the identity of its process as a tag.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import dagster as dg
import psutil
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter

PROCESS_TAG = "finetune/process"
UNFINISHED = [
    DagsterRunStatus.QUEUED,
    DagsterRunStatus.NOT_STARTED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.CANCELING,
]


def this_process() -> dict[str, str]:
    """The tag of a run that executes in this process: host, pid, and start time, as pids are used again."""
    return {PROCESS_TAG: f"{_host()}:{os.getpid()}:{_began(os.getpid())}"}


def tag_run(context: dg.AssetExecutionContext) -> None:
    """Put this process's tag on the run of a step, if it has none yet.

    Another executor starts a process for each step, which ends before the run does: such a run gets no tag.
    """
    if PROCESS_TAG not in context.run.tags and context.job_def.executor_def.name == dg.in_process_executor.name:
        context.instance.add_run_tags(context.run.run_id, this_process())


def is_dead(run: DagsterRun) -> bool:
    """True when the run's process was one of this machine and is gone. Of other machines' runs nothing is known."""
    host, _, rest = run.tags.get(PROCESS_TAG, "").partition(":")
    pid, _, began = rest.partition(":")
    if host != _host() or not pid.isdigit():
        return False
    return _began(int(pid)) != began


def end_dead_runs(instance: DagsterInstance) -> list[str]:
    """Report dead runs as failed (canceled, if that was being done) and free what slots they hold; their ids.

    Slots of runs that ended, or were deleted, are freed as well.
    """
    ended = []
    for run in instance.get_runs(RunsFilter(statuses=UNFINISHED)):
        if is_dead(run):
            if run.status == DagsterRunStatus.CANCELING:
                instance.report_run_canceled(run, "Its process is gone.")
            else:
                instance.report_run_failed(run, "Its process is gone: it was killed, or the machine went down.")
            ended.append(run.run_id)
    storage = instance.event_log_storage
    if storage.supports_global_concurrency_limits:
        for key in storage.get_concurrency_keys():
            info = storage.get_concurrency_info(key)
            for run_id in {entry.run_id for entry in (*info.claimed_slots, *info.pending_steps)}:
                run = instance.get_run_by_id(run_id)
                if run is None or run.is_finished:
                    storage.free_concurrency_slots_for_run(run_id)
    return ended


def unfinished_run_of(recipe: str, instance: DagsterInstance, chain: Sequence[str]) -> DagsterRun | None:
    """Return a run that materialises something of the recipe, or is about to.

    Args:
        chain: the parts that the keys of all assets of the recipe begin with.
    """
    for run in instance.get_runs(RunsFilter(statuses=UNFINISHED)):
        selected = run.asset_selection or ()
        if run.tags.get("recipe") == recipe or any([*key.path][: len(chain)] == [*chain] for key in selected):
            return run
    return None


def _began(pid: int) -> str | None:
    """When a process began, as a word to compare; None when there is none, or only its zombie.

    On Linux in clock ticks since the boot, which hold when the clock is set.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # proc(5): 3 state, 22 start
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        return None if state in "ZX" else f"{boot}-{fields[18]}"
    except OSError:
        pass
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.NoSuchProcess:
        return None


def _host() -> str:
    return socket.gethostname().replace(":", "_")[:63]
