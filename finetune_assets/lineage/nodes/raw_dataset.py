"""raw_dataset: a copy of the data files and of their registry entries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from finetune_assets.data import snapshot
from finetune_assets.data.registry import data_file, load_entries
from finetune_assets.data.row_changes import source_change
from finetune_assets.lineage.cost import Cost, Known, seconds_of
from finetune_assets.lineage.node import Node
from finetune_assets.recipe import Recipe
from finetune_assets.recipe.project import Project
from finetune_assets.store.artifact import Artifact
from finetune_assets.store.digests import DigestCache

COUNTED = 64_000_000  # bytes: the rows of a larger data file are not counted for an estimate


def _sources(recipe: Recipe, project: Project, digests: DigestCache) -> Mapping[str, str]:
    return snapshot.source_digests(project.root / recipe.dataset.dataset_dir, recipe.dataset.dataset, digests)


def _source_change(artifact: Artifact, recipe: Recipe, project: Project, source: str) -> str | None:
    return source_change(artifact.path, project.root / recipe.dataset.dataset_dir, source)


def _cost(node: Node, known: Known) -> Cost:
    return Cost(seconds_of(known.past(node.name), node.code_version), source_bytes(known))


def source_bytes(known: Known) -> int:
    """Return the size of the recipe's data files."""
    return sum(file.stat().st_size for file, _ in _data_files(known))


def source_rows(known: Known) -> list[int | None]:
    """Return about how many rows each data file has; None of those that are too large to count."""
    return [count_rows(file, answers) for file, answers in _data_files(known)]


def count_rows(file: Path, answers: str) -> int | None:
    """Return about how many rows a data file has, without parsing it: how often the column of answers is named."""
    if file.stat().st_size > COUNTED:
        return None
    return file.read_bytes().count(json.dumps(answers, ensure_ascii=False).encode())


def _data_files(known: Known) -> list[tuple[Path, str]]:
    """Return the data files, each with its column of answers."""
    folder = known.project.root / known.recipe.dataset.dataset_dir
    entries = load_entries(folder, known.recipe.dataset.dataset)
    return [(data_file(folder, entry), entry.columns.response) for entry in entries.values()]


# No tools: Python's own JSON and hashes, which are the same in every version.
NODE = Node(
    "raw_dataset",
    reads=("dataset.dataset", "dataset.dataset_dir"),
    sources=_sources,
    source_change=_source_change,
    cost=_cost,
)
