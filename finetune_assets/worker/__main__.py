"""The worker process: `python -m finetune_assets.worker`, started by `launch` or by any Dagster Pipes client.

The extra `job` of the Pipes context holds a task as JSON; see `tasks`. Every event is a custom message. The last one is
{"event": "done", "report": {...}} or {"event": "error", "kind", "message", "hint"}. The exit code is 0, or the
error's.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import Any

from dagster_pipes import PipesContext, open_dagster_pipes

from finetune_assets.inputs.remote_code import gate
from finetune_assets.machine.disk import disk_trouble
from finetune_assets.reporting.errors import FinetuneError, StepFailed, unforeseen
from finetune_assets.reporting.events import Event
from finetune_assets.reporting.masking import mask, mask_logging
from finetune_assets.worker.protocol import Failure, Report, read_task


def main() -> int:
    """Do the task; return the exit code."""
    quieten()
    mask_logging()
    with open_dagster_pipes() as pipes:
        outcome = _do(pipes.get_extra("job"), pipes)
        pipes.report_custom_message(outcome.as_json())
    return outcome.as_error().exit_code if isinstance(outcome, Failure) else 0


def quieten() -> None:
    """Turn off progress bars and advice of libraries, which would hide what matters when something fails."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the base model is a local folder: no network is needed
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "CUDA_VISIBLE_DEVICES" not in os.environ and "LOCAL_RANK" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # if several are visible, the trainer uses them all
    warnings.filterwarnings("ignore")


def _do(job: Any, pipes: PipesContext) -> Report | Failure:
    """Do the task and return the last message."""

    def progress(event: Event) -> None:
        pipes.report_custom_message(event.as_json())

    try:
        task = read_task(job)
    except StepFailed as error:
        return Failure.of(error)
    try:
        with gate(trust=task.model.trust_remote_code):
            return Report(report=task.run(progress))
    except FinetuneError as error:
        return Failure.of(error)
    except Exception as error:
        pipes.log.error(mask(traceback.format_exc()))
        # each library describes a full disk in its own words
        full = disk_trouble(error, task.out)
        return Failure.of(full or unforeseen(error, f"the worker process ({task.task})"))


if __name__ == "__main__":
    sys.exit(main())
