"""gguf_file: the merged model in llama.cpp's format, one file for each type, each compared with that model."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from finetune_assets.assets.step_asset import StepAsset, table
from finetune_assets.export.gguf import imatrix_file
from finetune_assets.export.gguf.make import GgufInputs, make_gguf
from finetune_assets.export.parity.limits import Figures, near_the_base
from finetune_assets.export.parity.picture import draw
from finetune_assets.export.parity.prove import CHECKS
from finetune_assets.lineage.materialise import Step
from finetune_assets.lineage.nodes.gguf_file import kept_figures, kept_files
from finetune_assets.models import base_model
from finetune_assets.recipe.gguf_types import IMATRIX_TYPES
from finetune_assets.reporting.events import message
from finetune_assets.reporting.pictures import embedded
from finetune_assets.store.artifact import Artifact, Made
from finetune_assets.worker.tasks.imatrix import Imatrix
from finetune_assets.worker.tasks.prove import Prove
from resources.gpu import POOL

PICTURE = "size_and_kl.png"
TINY = 1e-6  # nats per token: a smaller KL divergence counts as no change
LISTED = 5  # names of tensors that the page shows


def build(step: Step) -> Made:
    # a server of the file needs its stop tokens
    shutil.copyfile(step.inputs["merged_model"].path / "chat.json", step.staging / "chat.json")
    files = make_gguf(_inputs(step), step.progress)
    figures = step.launch(_proof(step, files))["figures"]
    if len(files) > 1:
        draw(step.staging / PICTURE, {kind: (files[kind]["bytes"], figures[kind]["kl"]) for kind in files})
    changed = step.inputs["merged_model"].metrics["check"]["kl_from_base"]
    for warning in near_the_base({kind: entry["kl"] for kind, entry in figures.items()}, changed):
        step.progress(message(warning))
    metrics: dict[str, Any] = {
        "types": {kind: {**files[kind], **figures[kind]} for kind in files},
        "checks": list(CHECKS),
        "kl_from_base": changed,
        **_imatrix_metrics(step, files),
    }
    parts = {kind: [entry["file"], "chat.json"] for kind, entry in files.items()}
    content = {name for names in parts.values() for name in names}
    if "imatrix" in metrics:
        content.add(imatrix_file.FILE)
    return Made(metrics, parts=parts, content=sorted(content))


def _inputs(step: Step) -> GgufInputs:
    """Return the inputs of the conversion."""
    recipe = step.recipe
    return GgufInputs(
        step.inputs["merged_model"].path,
        recipe.gguf.types,
        step.staging,
        name=recipe.name,
        about={
            "general.base_models": [base_model.description(recipe.model, step.project.root)],
            "general.datasets": [{"name": name} for name in recipe.dataset.dataset],
        },
        cache=step.project.cache,
        trust_remote_code=recipe.model.trust_remote_code,
        kept=_kept(step.previous, step.ingredients),
        measure=functools.partial(_measure, step) if recipe.gguf.imatrix else None,
    )


def _measure(step: Step, source: Path, matrix: Path) -> None:
    """Write the importance matrix of a GGUF file in full precision."""
    step.launch(
        Imatrix(
            out=step.staging,
            model=step.recipe.model,
            merged=step.inputs["merged_model"].path,
            gguf=source,
            rows=step.inputs["dataset_info"].path / f"{step.recipe.gguf.imatrix}.jsonl",
            file=matrix,
        )
    )


def _proof(step: Step, files: Mapping[str, Mapping[str, Any]]) -> Prove:
    """Return the task that compares the files with the merged model."""
    return Prove(
        out=step.staging,
        model=step.recipe.model,
        merged=step.inputs["merged_model"].path,
        held_out=step.inputs["dataset_info"].path / "test.jsonl",
        files={kind: step.staging / entry["file"] for kind, entry in files.items()},
        max_kl=step.recipe.gguf.max_kl,
        recorded=_recorded(step.previous, step.ingredients),
        written={kind: entry["sha256"] for kind, entry in files.items()},
    )


def _imatrix_metrics(step: Step, files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the manifest records of the importance matrix, if there is one."""
    matrix = step.staging / imatrix_file.FILE
    if not matrix.is_file():
        return {}
    user = next(step.staging / entry["file"] for kind, entry in files.items() if kind in IMATRIX_TYPES)
    return {"imatrix": {"rows": step.recipe.gguf.imatrix, **imatrix_file.facts(matrix, user)}}


def _kept(previous: Artifact | None, current: Mapping[str, Any]) -> dict[str, tuple[Path, str]]:
    """Return the previous artifact's files that a new build would reproduce byte for byte, each with its sha256."""
    if previous is None:
        return {}
    files = {kind: entry["file"] for kind, entry in previous.metrics["types"].items()}
    if "imatrix" in previous.metrics:
        files[imatrix_file.FILE] = imatrix_file.FILE
    ingredients, digests = previous.manifest["ingredients"], previous.manifest["files"]
    kept = kept_files(ingredients, current, files)
    return {kind: (previous.path / file, digests[file]["sha256"]) for kind, file in files.items() if kind in kept}


def _recorded(previous: Artifact | None, current: Mapping[str, Any]) -> dict[str, Figures]:
    """Return the previous artifact's figures of kept files, unless a further input of the figures has changed."""
    if previous is None:
        return {}
    types = previous.metrics["types"]
    names = [field.name for field in dataclasses.fields(Figures)]
    kept = kept_figures(previous.manifest["ingredients"], current, types)
    return {kind: Figures(**{name: entry[name] for name in names}) for kind, entry in types.items() if kind in kept}


def describe(artifact: Artifact) -> Mapping[str, dg.MetadataValue]:
    types = artifact.metrics["types"]
    page: dict[str, dg.MetadataValue] = {
        "types": table([_row(kind, entry, artifact.metrics["kl_from_base"]) for kind, entry in types.items()]),
        "checks passed by each": dg.MetadataValue.text(", ".join(artifact.metrics["checks"])),
    }
    if "imatrix" in artifact.metrics:
        page["weights weighed by"] = table([_matrix_row(artifact.metrics["imatrix"])])
    if (artifact.path / PICTURE).is_file():
        page["size and divergence"] = dg.MetadataValue.md(embedded(artifact.path / PICTURE, "size and KL"))
    return page


def _row(kind: str, entry: Mapping[str, Any], changed: float) -> dict[str, Any]:
    return {
        "type": kind,
        "file": entry["file"],
        "MB": round(entry["bytes"] / 1e6, 1),
        "KL (nats per token)": float(f"{entry['kl']:.3g}"),
        "share of what training changed": f"{entry['kl'] / max(changed, TINY):.1%}",
        "top-1 agreement": f"{entry['top1']:.1%}",
        "perplexity ratio": round(entry["ppl_ratio"], 4),
        "tokens/s here": entry["tokens_per_second"],
        "positions compared": entry["points"],
    }


def _matrix_row(facts: Mapping[str, Any]) -> dict[str, Any]:
    without = facts["without"]
    listed = ", ".join(without[:LISTED]) + (f" and {len(without) - LISTED} more" if len(without) > LISTED else "")
    return {
        "rows": facts["rows"],
        "conversations read": facts["conversations"],
        "tokens": facts["tokens"],
        "matrices with statistics": facts["entries"],
        "without": f"{len(without)}: {listed}" if without else "none",
        "experts never used": facts["unused_experts"],
    }


GGUF_FILE = StepAsset(
    name="gguf_file",
    description=(
        "The merged model in llama.cpp's format: converted once in full precision by llama.cpp's own converter, then "
        "quantised to each type of the recipe. llama.cpp runs every file on held-out conversations before it is "
        "published: same token ids, same chat template, and next-token distributions as close to the merged model's "
        "as its type requires (gguf.max_kl). A type added later does not redo the others. With gguf.imatrix, the types "
        "from q6_k down have a smaller quantisation error in the weights that matter most; imatrix.gguf lists these."
    ),
    kinds={"gguf"},
    pool=POOL,
    build=build,
    describe=describe,
)
