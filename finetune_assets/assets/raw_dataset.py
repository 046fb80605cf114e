"""raw_dataset: a copy of the source files, taken when the chain ran."""

from __future__ import annotations

from collections.abc import Mapping

import dagster as dg

from finetune_assets.assets.step_asset import StepAsset, table
from finetune_assets.data import snapshot
from finetune_assets.lineage.materialise import Step
from finetune_assets.store.artifact import Artifact, Made


def build(step: Step) -> Made:
    section = step.recipe.dataset
    return Made(snapshot.take(step.project.root / section.dataset_dir, section.dataset, step.staging))


def describe(artifact: Artifact) -> Mapping[str, dg.MetadataValue]:
    files = artifact.metrics["datasets"]
    return {
        "files": table(files),
        "bytes": dg.MetadataValue.int(sum(file["bytes"] for file in files)),
    }


RAW_DATASET = StepAsset(
    name="raw_dataset",
    description=(
        "An immutable copy of the recipe's source files and their registry entries. "
        "Later edits of the originals make this asset stale; they never change the copy."
    ),
    kinds={"json"},
    build=build,
    describe=describe,
)
