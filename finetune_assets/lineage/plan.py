"""What a run would do, and why: fingerprints compared with what is published. The only notion of staleness there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finetune_assets.data import snapshot
from finetune_assets.data.row_changes import source_change, split_change
from finetune_assets.export.ollama.publish import serving_problem
from finetune_assets.lineage.graph import NODES, Node, upstream_of
from finetune_assets.lineage.identity import differences, fingerprint, own_ingredients
from finetune_assets.models import base_model
from finetune_assets.recipe import Recipe
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import BadInput
from finetune_assets.store.artifact import Artifact
from finetune_assets.store.artifact_store import ArtifactStore
from finetune_assets.store.digests import DigestCache

State = Literal["fresh", "stale", "missing", "maybe"]


@dataclass(frozen=True)
class Planned:
    """One asset's state: `maybe` means that an upstream will run and may come out as it was.

    `artifact` is what is published for the wanted fingerprint, whole and in place: set exactly when fresh. `wanted` is
    that fingerprint, known as soon as every upstream is fresh.
    """

    asset: str
    state: State
    reasons: tuple[str, ...]
    artifact: Artifact | None = None
    wanted: str | None = None


def open_store(project: Project) -> ArtifactStore:
    """The project's artifacts."""
    return ArtifactStore(project.store, DigestCache(project.cache / "digests.sqlite"))


def make_plan(recipe: Recipe, project: Project, store: ArtifactStore, *, upto: str | None = None) -> dict[str, Planned]:
    """The state of every asset of a recipe, upstreams first. Changes nothing.

    Args:
        upto: judge this asset and what it is made of, and no others.

    Raises:
        BadInput: a source (registry, data file, base model folder) is not there or cannot be understood.
    """
    plan: dict[str, Planned] = {}
    needed = NODES if upto is None else upstream_of({upto})
    for name, node in NODES.items():
        if name in needed:
            plan[name] = _judge(node, recipe, project, store, plan)
    return plan


def sources_of(node: Node, recipe: Recipe, project: Project, digests: DigestCache) -> dict[str, str]:
    """Digests of what a node reads from outside the lineage.

    Raises:
        BadInput: a source is not there, cannot be understood, or has a file that cannot be read.
    """
    try:
        if node.name == "raw_dataset":
            return snapshot.source_digests(project.root / recipe.dataset.dataset_dir, recipe.dataset.dataset, digests)
        if node.name == "base_model":
            return base_model.source_digests(recipe.model, project.root, digests)
    except OSError as error:
        why = f"{error.filename} cannot be read: {error.strerror or error}"
        raise BadInput(f"{recipe.name}/{node.name}: {why}", "see to its permissions, and to the disk") from error
    return {}


def trouble(artifact: Artifact, project: Project, digests: DigestCache) -> str | None:
    """Why a published artifact has to be made again although nothing it reads has changed, or None if it is good."""
    if (damage := artifact.damage(digests)) is not None or artifact.manifest["asset"] != "ollama_model":
        return damage
    return serving_problem(artifact.metrics, project.ollama_models)


def _judge(node: Node, recipe: Recipe, project: Project, store: ArtifactStore, plan: Mapping[str, Planned]) -> Planned:
    last = store.current(recipe.name, node.name)
    sources = sources_of(node, recipe, project, store.digests)
    running = [up.asset for up in node.upstreams if plan[up.asset].artifact is None]
    if running:
        waits = f"upstream {', '.join(running)} will run"
        if last is None:
            return Planned(node.name, "missing", (_why_missing(store, recipe, node), waits))
        # reasons that hold whatever the upstreams turn out to be
        ingredients = {**last.manifest["ingredients"], **own_ingredients(node, recipe, sources)}
        own = _differences(last, ingredients, recipe, project, store, plan)
        return Planned(node.name, "stale" if own else "maybe", (*own, waits))
    wanted = fingerprint(node, recipe, {up.asset: _artifact(plan, up.asset) for up in node.upstreams}, sources)
    artifact = store.get(recipe.name, node.name, wanted.hex)
    if artifact is not None:
        if (why := trouble(artifact, project, store.digests)) is None:
            return Planned(node.name, "fresh", (), artifact, wanted.hex)
        return Planned(node.name, "stale", (why,), wanted=wanted.hex)
    foreign = store.foreign_entry(recipe.name, node.name, wanted.hex)
    there = (f"{wanted.hex} is there, but {foreign.why}: it will be set aside",) if foreign else ()
    if last is None:
        return Planned(node.name, "missing", there or (_why_missing(store, recipe, node),), wanted=wanted.hex)
    reasons = _differences(last, wanted.ingredients, recipe, project, store, plan)
    return Planned(node.name, "stale", (*reasons, *there), wanted=wanted.hex)


def _artifact(plan: Mapping[str, Planned], asset: str) -> Artifact:
    artifact = plan[asset].artifact
    assert artifact is not None
    return artifact


def _why_missing(store: ArtifactStore, recipe: Recipe, node: Node) -> str:
    lost = store.lost_current(recipe.name, node.name)
    return f"what was made last is of no use ({lost})" if lost else "never made"


def _differences(
    last: Artifact,
    ingredients: Mapping[str, Any],
    recipe: Recipe,
    project: Project,
    store: ArtifactStore,
    plan: Mapping[str, Planned],
) -> list[str]:
    """What has changed since the artifact made last; of data sets and their splits, which rows."""

    def look(kind: str, key: str) -> str | None:
        if kind == "sources" and last.manifest["asset"] == "raw_dataset":
            return source_change(last.path, project.root / recipe.dataset.dataset_dir, key)
        upstream, _, split = key.partition("/")
        if kind == "upstreams" and upstream == "dataset_info":
            before = store.get(recipe.name, upstream, last.inputs.get(upstream, ""))
            after = _artifact(plan, upstream)
            return split_change(*(data.path / f"{split}.jsonl" for data in (before, after))) if before else None
        return None

    return differences(last.manifest["ingredients"], ingredients, recipe, look)
