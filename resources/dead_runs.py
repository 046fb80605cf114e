"""Runs whose process is gone: they are reported as failed, and their slots are freed.

A killed run reports nothing. Dagster's monitoring asks the launcher, and the default launcher does not know; a run of
the command line has no launcher. So every run carries the identity of its process as a tag.
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
    """Return the tag of a run in this process: host, pid and start time, because the system reuses pids."""
    return {PROCESS_TAG: f"{_host()}:{os.getpid()}:{_began(os.getpid())}"}


def tag_run(context: dg.AssetExecutionContext) -> None:
    """Tag the run of a step with this process, unless it has a tag.

    Other executors start a process for each step, which ends before the run does: such a run gets no tag.
    """
    if PROCESS_TAG not in context.run.tags and context.job_def.executor_def.name == dg.in_process_executor.name:
        context.instance.add_run_tags(context.run.run_id, this_process())


def is_dead(run: DagsterRun) -> bool:
    """Return True if the run's process was on this machine and is gone; False if it was on a different machine."""
    host, _, rest = run.tags.get(PROCESS_TAG, "").partition(":")
    pid, _, began = rest.partition(":")
    if host != _host() or not pid.isdigit():
        return False
    return _began(int(pid)) != began


def end_dead_runs(instance: DagsterInstance) -> list[str]:
    """Report dead runs as failed (as canceled, if that was under way), free their slots, and return their ids.

    Slots of finished and deleted runs are freed as well.
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
    """Return a run that materialises, or is about to materialise, an asset of the recipe; None if there is none.

    Args:
        chain: the first parts of the keys of all assets of the recipe.
    """
    for run in instance.get_runs(RunsFilter(statuses=UNFINISHED)):
        selected = run.asset_selection or ()
        if run.tags.get("recipe") == recipe or any([*key.path][: len(chain)] == [*chain] for key in selected):
            return run
    return None


def _began(pid: int) -> str | None:
    """Return the start time of a process as a text to compare; None if there is no process, or a zombie.

    On Linux it is in clock ticks since the boot, which do not change when the clock is set.
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
