"""gguf_file: the merged model in llama.cpp's format, one file for each type."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from finetune_assets.artifacts import Artifact, Made
from finetune_assets.assets.step_asset import StepAsset, table
from finetune_assets.export.gguf_types import make_gguf
from finetune_assets.materialise import Step


def build(step: Step) -> Made:
    merged = step.inputs["merged_model"].path
    # whoever serves a file needs its stop tokens
    shutil.copyfile(merged / "chat.json", step.staging / "chat.json")
    facts = make_gguf(
        merged,
        step.recipe.gguf.types,
        step.staging,
        name=step.recipe.name,
        cache=step.project.cache,
        kept=_kept(step.previous, step.ingredients),
        progress=step.progress,
    )
    return Made({"types": facts}, parts={kind: [entry["file"], "chat.json"] for kind, entry in facts.items()})


def _kept(previous: Artifact | None, wanted: Mapping[str, Any]) -> dict[str, Path]:
    """The previous artifact's files, if all that differs from today's wishes is which types are wanted."""
    if previous is None:
        return {}
    made = previous.manifest["ingredients"]
    if any(made[key] != wanted[key] for key in wanted if key != "recipe"):
        return {}
    return {kind: previous.path / entry["file"] for kind, entry in previous.metrics["types"].items()}


def describe(artifact: Artifact) -> Mapping[str, dg.MetadataValue]:
    rows = [{"type": kind, **entry} for kind, entry in artifact.metrics["types"].items()]
    return {
        "types": table(rows),
        "serve it": dg.MetadataValue.md(
            "\n".join(["```", *(f"llama-server -m {artifact.path / row['file']}" for row in rows), "```"])
        ),
    }


GGUF_FILE = StepAsset(
    name="gguf_file",
    description=(
        "The merged model in llama.cpp's format: converted once in full precision by llama.cpp's own converter, then "
        "quantised to each type of the recipe. A type added later does not redo the others."
    ),
    kinds={"gguf"},
    build=build,
    describe=describe,
)
