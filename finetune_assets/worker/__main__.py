"""The worker process: `python -m finetune_assets.worker`, started by `launch` or by any Dagster Pipes client.

The extra `job` of the Pipes context says what to do: {"task": one of TASKS, "out": path, "model": that section of the
recipe, "device": auto, cuda, mps or cpu} and, beside these,
    train: "base", "rows", "validation", "vocabulary": paths (the last two may be null), "train": a section;
    evaluate: "base", "adapter", "rows", "test": paths, "train", "evaluate": sections of the recipe;
    merge: "base", "adapter", "held_out": paths, "export": a section of the recipe;
    imatrix: "merged", "gguf", "rows", "file": paths;
    prove: "merged", "held_out": paths, "files": GGUF type -> path, "max_kl", "recorded": type -> figures,
        "written": type -> sha256 of the file as it was made.
Every event is a custom message. The last one is {"event": "done", "report": {...}} or {"event": "error", "kind",
"message", "hint"}; the exit code then is 0, or the error's.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from dagster_pipes import open_dagster_pipes

from finetune_assets.inputs.remote_code import gate
from finetune_assets.machine.device import choose_device
from finetune_assets.machine.disk import disk_trouble
from finetune_assets.recipe import EvaluateSection, ExportSection, ModelSection, TrainSection
from finetune_assets.reporting.errors import FinetuneError, unforeseen
from finetune_assets.reporting.events import Progress, message
from finetune_assets.reporting.masking import mask, mask_logging
from finetune_assets.worker.launch import trusted
from finetune_assets.worker.protocol import Failure, Report


def quieten() -> None:
    """No progress bars, no advice: what libraries say by habit hides what matters when something fails."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the base model is a folder: nothing here needs a network
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "CUDA_VISIBLE_DEVICES" not in os.environ and "LOCAL_RANK" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # with several in sight the trainer would try to use them all
    warnings.filterwarnings("ignore")


def train(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    from finetune_assets.export.preflight.prompts import rehearse
    from finetune_assets.training.stages.by_name import STAGES

    section, model = TrainSection.model_validate(job["train"]), ModelSection.model_validate(job["model"])
    base, rows = Path(job["base"]), Path(job["rows"])
    if job["vocabulary"]:
        progress(message("asking llama.cpp whether it reads prompts as training does"))
        rehearse(Path(job["vocabulary"]), base, rows, model)
    return STAGES[section.stage](
        base,
        rows,
        Path(job["validation"]) if job["validation"] else None,
        Path(job["out"]),
        train=section,
        model=model,
        device=choose_device(section.bf16, section.fp16, job.get("device", "auto")),
        progress=progress,
    )


def evaluate(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    from finetune_assets.evaluation import evaluate as report

    section = TrainSection.model_validate(job["train"])
    return report.evaluate(
        Path(job["base"]),
        Path(job["adapter"]),
        Path(job["test"]),
        Path(job["out"]),
        evaluate=EvaluateSection.model_validate(job["evaluate"]),
        device=choose_device(section.bf16, section.fp16, job.get("device", "auto")),
        train=Path(job["rows"]),
        cutoff_len=section.cutoff_len,
        trust_remote_code=ModelSection.model_validate(job["model"]).trust_remote_code,
        progress=progress,
    )


def merge(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    from finetune_assets.export.merge import merge
    from finetune_assets.export.parity import merged as merge_check

    base, adapter, out = Path(job["base"]), Path(job["adapter"]), Path(job["out"])
    section, device = (
        ExportSection.model_validate(job["export"]),
        choose_device(False, False, job.get("device", "auto")),
    )
    trust = ModelSection.model_validate(job["model"]).trust_remote_code
    report = merge.merge(
        base,
        adapter,
        out,
        export_size=section.export_size,
        export_dtype=section.export_dtype,
        device="cpu" if section.export_device == "cpu" else device.kind,
        trust_remote_code=trust,
        progress=progress,
    )
    held_out = Path(job["held_out"])
    check = merge_check.check(base, adapter, out, held_out, device, trust_remote_code=trust, progress=progress)
    return {**report, "check": check}


def imatrix(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    from finetune_assets.export.gguf import imatrix

    imatrix.measure(
        Path(job["merged"]),
        Path(job["gguf"]),
        Path(job["rows"]),
        Path(job["file"]),
        choose_device(False, False, job.get("device", "auto")),
        trust_remote_code=ModelSection.model_validate(job["model"]).trust_remote_code,
        progress=progress,
    )
    return {}


def prove(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    from finetune_assets.export.parity import prove as parity

    figures = parity.prove(
        {kind: Path(file) for kind, file in job["files"].items()},
        Path(job["merged"]),
        Path(job["held_out"]),
        device=lambda: choose_device(False, False, job.get("device", "auto")),
        max_kl=job["max_kl"],
        recorded={kind: parity.Figures(**recorded) for kind, recorded in job["recorded"].items()},
        written=job["written"],
        trust_remote_code=ModelSection.model_validate(job["model"]).trust_remote_code,
        progress=progress,
    )
    return {"figures": {kind: dataclasses.asdict(found) for kind, found in figures.items()}}


TASKS = {"train": train, "evaluate": evaluate, "merge": merge, "imatrix": imatrix, "prove": prove}


def main() -> int:
    """Do the job; the exit code."""
    quieten()
    mask_logging()
    with open_dagster_pipes() as pipes:
        job = pipes.get_extra("job")
        try:
            with gate(trust=trusted(job)):
                report = TASKS[job["task"]](job, lambda event: pipes.report_custom_message(event.as_json()))
        except Exception as error:
            failure = error if isinstance(error, FinetuneError) else None
            if failure is None:
                pipes.log.error(mask(traceback.format_exc()))
                # a full disk reaches us in the words of whichever library was writing
                full = disk_trouble(error, Path(job["out"]))
                failure = full or unforeseen(error, f"the process at work ({job['task']})")
            pipes.report_custom_message(Failure.of(failure).as_json())
            return failure.exit_code
        pipes.report_custom_message(Report(report=report).as_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
