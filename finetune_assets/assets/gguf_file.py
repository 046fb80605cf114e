"""gguf_file: the merged model in llama.cpp's format, one file for each type, each proven to be that model."""

from __future__ import annotations

import base64
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from finetune_assets import base_model
from finetune_assets.artifacts import Artifact, Made
from finetune_assets.assets.step_asset import StepAsset, table
from finetune_assets.export.gguf_types import bytes_decided_by, make_gguf
from finetune_assets.export.parity import CHECKS, Figures
from finetune_assets.export.parity_picture import draw
from finetune_assets.materialise import Step
from resources.gpu import POOL

PICTURE = "size_and_kl.png"


def build(step: Step) -> Made:
    merged, gguf = step.inputs["merged_model"].path, step.recipe.gguf
    # whoever serves a file needs its stop tokens
    shutil.copyfile(merged / "chat.json", step.staging / "chat.json")
    facts = make_gguf(
        merged,
        gguf.types,
        step.staging,
        name=step.recipe.name,
        about={
            "general.base_models": [base_model.description(step.recipe.model, step.project.root)],
            "general.datasets": [{"name": name} for name in step.recipe.dataset.dataset],
        },
        cache=step.project.cache,
        kept=_kept(step.previous, step.ingredients),
        progress=step.progress,
    )
    report = step.launch(
        {
            "task": "prove",
            "out": str(step.staging),
            "files": {kind: str(step.staging / entry["file"]) for kind, entry in facts.items()},
            "merged": str(merged),
            "held_out": str(step.inputs["dataset_info"].path / "test.jsonl"),
            "max_kl": gguf.max_kl,
            "recorded": _recorded(step.previous, step.ingredients),
            "model": step.recipe.model.model_dump(),
        }
    )
    figures = report["figures"]
    parts = {kind: [entry["file"], "chat.json"] for kind, entry in facts.items()}
    if len(facts) > 1:
        draw(step.staging / PICTURE, {kind: (facts[kind]["bytes"], figures[kind]["kl"]) for kind in facts})
    return Made(
        {
            "types": {kind: {**facts[kind], **figures[kind]} for kind in facts},
            "checks": list(CHECKS),
        },
        parts=parts,
        content=sorted({name for files in parts.values() for name in files}),
    )


def _kept(previous: Artifact | None, wanted: Mapping[str, Any]) -> dict[str, Path]:
    """The previous artifact's files, if all that differs from today's wishes is which types are wanted, and why."""
    if previous is None or bytes_decided_by(previous.manifest["ingredients"]) != bytes_decided_by(wanted):
        return {}
    return {kind: previous.path / entry["file"] for kind, entry in previous.metrics["types"].items()}


def _recorded(previous: Artifact | None, wanted: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The previous artifact's figures, if its files are kept and nothing else has changed that they depend on."""
    if previous is None or not _kept(previous, wanted):
        return {}
    made = previous.manifest["ingredients"]
    if any(made[key] != wanted[key] for key in wanted if key != "recipe"):
        return {}
    names = [field.name for field in dataclasses.fields(Figures)]
    return {kind: {name: entry[name] for name in names} for kind, entry in previous.metrics["types"].items()}


def describe(artifact: Artifact) -> Mapping[str, dg.MetadataValue]:
    types = artifact.metrics["types"]
    files = [f"llama-server -m {artifact.path / entry['file']}" for entry in types.values()]
    page: dict[str, dg.MetadataValue] = {
        "types": table([_row(kind, entry) for kind, entry in types.items()]),
        "serve it": dg.MetadataValue.md("\n".join(["```", *files, "```"])),
        "checks passed by each": dg.MetadataValue.text(", ".join(artifact.metrics["checks"])),
    }
    if (artifact.path / PICTURE).is_file():
        picture = base64.b64encode((artifact.path / PICTURE).read_bytes()).decode()
        page["size and divergence"] = dg.MetadataValue.md(f"![size and KL](data:image/png;base64,{picture})")
    return page


def _row(kind: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": kind,
        "file": entry["file"],
        "MB": round(entry["bytes"] / 1e6, 1),
        "KL (nats per token)": float(f"{entry['kl']:.3g}"),
        "same favourite": f"{entry['top1']:.1%}",
        "perplexity ratio": round(entry["ppl_ratio"], 4),
        "tokens/s here": entry["tokens_per_second"],
        "places compared": entry["points"],
    }


GGUF_FILE = StepAsset(
    name="gguf_file",
    description=(
        "The merged model in llama.cpp's format: converted once in full precision by llama.cpp's own converter, then "
        "quantised to each type of the recipe. Every file is run by llama.cpp on held-out conversations before it is "
        "published: same token ids, same words around them, and next-token distributions as near to the merged "
        "model's as its type allows (gguf.max_kl). A type added later does not redo the others."
    ),
    kinds={"gguf"},
    pool=POOL,
    build=build,
    describe=describe,
)
