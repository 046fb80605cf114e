"""The training process: `python -m finetune_assets.training.worker JOB.json [--events-fd N]`.

The job is {"base", "rows", "validation", "out": paths (validation may be null), "train", "model": the recipe's
sections, "device": "auto", "cuda", "mps" or "cpu"}. Events go out as JSON lines, to file descriptor N or else to
standard output, which nothing else can reach: whatever libraries print ends up on standard error.
The last line is {"event": "done", "report": {...}} or {"event": "error", "kind", "message", "hint"}.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import IO, Any

from finetune_assets.disk import disk_trouble
from finetune_assets.errors import BadInput, FinetuneError, StepFailed


def claim_events(fd: int | None) -> IO[str]:
    """A private stream for events; from here on, standard output is standard error."""
    events = os.fdopen(os.dup(1) if fd is None else fd, "w", encoding="utf-8", newline="\n")
    os.set_inheritable(events.fileno(), False)
    sys.stdout.flush()
    os.dup2(2, 1)
    return events


def quieten() -> None:
    """No progress bars, no advice: what libraries say by habit hides what matters when something fails."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the base model is a folder: training needs no network
    if "CUDA_VISIBLE_DEVICES" not in os.environ and "LOCAL_RANK" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # with several in sight the trainer would try to use them all
    warnings.filterwarnings("ignore")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def work(job: dict[str, Any], progress: Any) -> dict[str, Any]:
    """Run one job and return the trainer's report."""
    from finetune_assets.device import choose_device
    from finetune_assets.recipe import ModelSection, TrainSection
    from finetune_assets.training.sft import train

    section = TrainSection.model_validate(job["train"])
    return train(
        Path(job["base"]),
        Path(job["rows"]),
        Path(job["validation"]) if job.get("validation") else None,
        Path(job["out"]),
        train=section,
        model=ModelSection.model_validate(job["model"]),
        device=choose_device(section.bf16, section.fp16, job.get("device", "auto")),
        progress=progress,
    )


def main(arguments: list[str]) -> int:
    job_file, *rest = arguments
    events = claim_events(int(rest[1]) if rest[:1] == ["--events-fd"] else None)

    def send(event: dict[str, Any]) -> None:
        events.write(json.dumps(event, ensure_ascii=False) + "\n")
        events.flush()

    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    try:
        quieten()
        report = work(job, send)
    except Exception as error:
        # a full disk reaches us in the words of whichever library was writing
        failure = error if isinstance(error, FinetuneError) else disk_trouble(error, Path(job["out"]))
        if failure is None:
            raise
        kind = BadInput if isinstance(failure, BadInput) else StepFailed
        send({"event": "error", "kind": kind.__name__, "message": failure.message, "hint": failure.hint})
        return failure.exit_code
    send({"event": "done", "report": report})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
