"""What a run would do, and why: fingerprints compared with what is published. The only notion of staleness there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from finetune_assets import base_model
from finetune_assets.artifacts import Artifact, ArtifactStore
from finetune_assets.data import snapshot
from finetune_assets.digests import DigestCache
from finetune_assets.export.serving import serving_problem
from finetune_assets.identity import differences, fingerprint, recipe_values
from finetune_assets.lineage import NODES, Node
from finetune_assets.project import Project
from finetune_assets.recipe import Recipe

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


def make_plan(recipe: Recipe, project: Project, store: ArtifactStore) -> dict[str, Planned]:
    """The state of every asset of a recipe, upstreams first. Changes nothing.

    Raises:
        BadInput: a source (registry, data file, base model folder) is not there or cannot be understood.
    """
    plan: dict[str, Planned] = {}
    for node in NODES.values():
        plan[node.name] = _judge(node, recipe, project, store, plan)
    return plan


def sources_of(node: Node, recipe: Recipe, project: Project, digests: DigestCache) -> dict[str, str]:
    """Digests of what a node reads from outside the lineage."""
    if node.name == "raw_dataset":
        return snapshot.source_digests(project.root / recipe.dataset.dataset_dir, recipe.dataset.dataset, digests)
    if node.name == "base_model":
        return base_model.source_digests(recipe.model, project.root, digests)
    return {}


def _judge(node: Node, recipe: Recipe, project: Project, store: ArtifactStore, plan: Mapping[str, Planned]) -> Planned:
    last = store.current(recipe.name, node.name)
    sources = sources_of(node, recipe, project, store.digests)
    running = [up.asset for up in node.upstreams if plan[up.asset].artifact is None]
    if running:
        waits = f"upstream {', '.join(running)} will run"
        if last is None:
            return Planned(node.name, "missing", ("never made", waits))
        own = _own_changes(last, node, recipe, sources)
        return Planned(node.name, "stale" if own else "maybe", (*own, waits))
    wanted = fingerprint(node, recipe, {up.asset: _artifact(plan, up.asset) for up in node.upstreams}, sources)
    artifact = store.get(recipe.name, node.name, wanted.hex)
    if artifact is not None:
        damage = artifact.damage(store.digests) or (
            serving_problem(artifact.metrics, project.ollama_models) if node.name == "ollama_model" else None
        )
        if damage is None:
            return Planned(node.name, "fresh", (), artifact, wanted.hex)
        return Planned(node.name, "stale", (damage,), wanted=wanted.hex)
    if last is None:
        return Planned(node.name, "missing", ("never made",), wanted=wanted.hex)
    reasons = tuple(differences(last.manifest["ingredients"], wanted.ingredients, recipe))
    return Planned(node.name, "stale", reasons, wanted=wanted.hex)


def _artifact(plan: Mapping[str, Planned], asset: str) -> Artifact:
    artifact = plan[asset].artifact
    assert artifact is not None
    return artifact


def _own_changes(last: Artifact, node: Node, recipe: Recipe, sources: Mapping[str, str]) -> list[str]:
    """Reasons that hold whatever the upstreams turn out to be."""
    old = last.manifest["ingredients"]
    own = {"recipe": recipe_values(node, recipe), "sources": sources, "code_version": node.code_version}
    return differences(old, {**old, **own}, recipe)
