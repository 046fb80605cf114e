"""lora_adapter: the trained weights, separate from the base model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import dagster as dg

from finetune_assets.assets.step_asset import StepAsset, figure, table
from finetune_assets.chat.template_limits import prove_folder
from finetune_assets.data.rows import read_split
from finetune_assets.export.preflight.exportable import check_exportable
from finetune_assets.lineage.materialise import Step
from finetune_assets.reporting.pictures import embedded
from finetune_assets.store.artifact import Artifact, Made
from finetune_assets.worker.tasks.train import Train
from resources.gpu import POOL

LOOKS = ["loss.png", "training_log.jsonl"]  # for people only; they are not part of the trained weights
LISTED = 10  # steps whose loss is in the table
TRIED_ROWS = 50  # rows of the train split that the chat template is tested with
FIGURES = {
    "final loss": "final_loss",
    "validation loss": "validation_loss",
    "optimiser steps": "steps",
    "rows": "rows",
    "cut rows": "cut_rows",
    "tokens/s": "tokens_per_second",
    "seconds of training": "seconds",
    "peak memory (GiB)": "peak_memory_gib",
    "trainable parameters": "trainable_parameters",
    "device": "device",
    "device memory (GiB)": "device_memory_gib",
    "precision": "precision",
}


def build(step: Step) -> Made:
    data, base = step.inputs["dataset_info"].path, step.inputs["base_model"]
    conversations = [row["messages"] for row in read_split(data / "train.jsonl", limit=TRIED_ROWS)]
    prove_folder(base.path, step.project.cache, conversations)  # before the step takes the device
    vocabulary = check_exportable(
        base.path,
        base.data_version,
        step.project.cache,
        step.progress,
        trust_remote_code=step.recipe.model.trust_remote_code,
    )
    task = Train(
        out=step.staging,
        model=step.recipe.model,
        base=base.path,
        rows=data / "train.jsonl",
        validation=data / "validation.jsonl",
        vocabulary=vocabulary,
        train=step.recipe.train,
    )
    report = step.launch(task)
    content = [path.name for path in sorted(step.staging.iterdir()) if path.name not in LOOKS]
    return Made(report, content=content)


def describe(artifact: Artifact) -> Mapping[str, dg.MetadataValue]:
    facts = artifact.metrics
    return {
        "loss by step": table(_losses(artifact.path / "training_log.jsonl")),
        "loss curve": dg.MetadataValue.md(embedded(artifact.path / "loss.png", "loss curve")),
        **{title: figure(facts[key]) for title, key in FIGURES.items() if facts.get(key) is not None},
    }


def _losses(log: Path) -> list[dict[str, float]]:
    """Return some steps with their losses, the first and the last among them: the picture takes a click."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [entry for entry in entries if entry["event"] == "step" and entry.get("loss") is not None]
    stride = -(-len(steps) // LISTED)
    chosen = steps[::-stride][::-1] if steps else []
    if chosen and chosen[0] is not steps[0]:
        chosen.insert(0, steps[0])
    return [{"step": entry["step"], "loss": round(entry["loss"], 4)} for entry in chosen]


LORA_ADAPTER = StepAsset(
    name="lora_adapter",
    description=(
        "A LoRA adapter trained with TRL and PEFT on the train split, in a separate process; saved as safetensors "
        "together with the tokenizer and the chat template of the training."
    ),
    kinds={"pytorch", "huggingface"},
    pool=POOL,
    build=build,
    describe=describe,
)
