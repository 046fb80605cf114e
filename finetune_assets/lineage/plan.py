"""The plan: what a run would do, and why. Compares fingerprints with manifests; nothing else decides staleness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_assets.lineage.graph import NODES, upstream_of
from finetune_assets.lineage.identity import differences, fingerprint, own_ingredients
from finetune_assets.lineage.node import Node
from finetune_assets.lineage.planned import Planned
from finetune_assets.recipe import Recipe
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import BadInput
from finetune_assets.store.artifact import Artifact
from finetune_assets.store.artifact_store import ArtifactStore
from finetune_assets.store.digests import DigestCache


def open_store(project: Project) -> ArtifactStore:
    """Open the project's artifact store."""
    return ArtifactStore(project.store, DigestCache(project.cache / "digests.sqlite"))


def make_plan(recipe: Recipe, project: Project, store: ArtifactStore, *, upto: str | None = None) -> dict[str, Planned]:
    """Judge every asset of a recipe, upstreams first. Changes nothing.

    Args:
        upto: judge only this asset and its ancestors.

    Raises:
        BadInput: a source (registry, data file, base model folder) is missing or invalid.
    """
    planner = _Planner(recipe, project, store)
    needed = NODES if upto is None else upstream_of({upto})
    for name, node in NODES.items():
        if name in needed:
            planner.plan[name] = planner.judge(node)
    return planner.plan


def sources_of(node: Node, recipe: Recipe, project: Project, digests: DigestCache) -> dict[str, str]:
    """Return digests of what a node reads from outside the lineage.

    Raises:
        BadInput: a source is missing, invalid, or has a file that cannot be read.
    """
    try:
        return dict(node.sources(recipe, project, digests))
    except OSError as error:
        why = f"{error.filename} cannot be read: {error.strerror or error}"
        raise BadInput(f"{recipe.name}/{node.name}: {why}", "check its permissions, and the disk") from error


def invalid_reason(artifact: Artifact, project: Project, digests: DigestCache) -> str | None:
    """Return why a published artifact is no longer valid although its inputs are the same, or None if it is valid."""
    if (damage := artifact.damage(digests)) is not None:
        return damage
    return NODES[artifact.manifest["asset"]].problem(artifact, project)


class _Planner:
    """The states judged so far; assets are judged one after the other, upstreams first."""

    def __init__(self, recipe: Recipe, project: Project, store: ArtifactStore):
        self.plan: dict[str, Planned] = {}
        self._recipe = recipe
        self._project = project
        self._store = store

    def judge(self, node: Node) -> Planned:
        sources = sources_of(node, self._recipe, self._project, self._store.digests)
        last = self._store.current(self._recipe.name, node.name)
        if running := [up.asset for up in node.upstreams if self.plan[up.asset].artifact is None]:
            return self._waiting(node, last, sources, f"upstream {', '.join(running)} will run")
        upstreams = {up.asset: self._upstream(up.asset) for up in node.upstreams}
        wanted = fingerprint(node, self._recipe, upstreams, sources)
        artifact = self._store.get(self._recipe.name, node.name, wanted.hex)
        if artifact is not None:
            if (why := invalid_reason(artifact, self._project, self._store.digests)) is None:
                return Planned(node.name, "fresh", (), artifact, wanted.hex)
            return Planned(node.name, "stale", (why,), wanted=wanted.hex)
        foreign = self._store.foreign_entry(self._recipe.name, node.name, wanted.hex)
        notes = (f"{wanted.hex} exists, but {foreign.why}: it will be set aside",) if foreign else ()
        if last is None:
            return Planned(node.name, "missing", notes or (self._why_missing(node),), wanted=wanted.hex)
        reasons = self._differences(last, wanted.ingredients)
        return Planned(node.name, "stale", (*reasons, *notes), wanted=wanted.hex)

    def _waiting(self, node: Node, last: Artifact | None, sources: Mapping[str, str], waits: str) -> Planned:
        """Judge an asset whose upstreams will run: only by the reasons that hold whatever they produce."""
        if last is None:
            return Planned(node.name, "missing", (self._why_missing(node), waits))
        ingredients = {**last.manifest["ingredients"], **own_ingredients(node, self._recipe, sources)}
        own = self._differences(last, ingredients)
        return Planned(node.name, "stale" if own else "maybe", (*own, waits))

    def _upstream(self, asset: str) -> Artifact:
        artifact = self.plan[asset].artifact
        assert artifact is not None
        return artifact

    def _why_missing(self, node: Node) -> str:
        lost = self._store.lost_current(self._recipe.name, node.name)
        return f"the last artifact is unusable ({lost})" if lost else "never made"

    def _differences(self, last: Artifact, ingredients: Mapping[str, Any]) -> list[str]:
        """Describe what changed since the last artifact; for data sets and splits, which rows."""

        def inside(kind: str, key: str) -> str | None:
            if kind == "sources":
                return NODES[last.manifest["asset"]].source_change(last, self._recipe, self._project, key)
            return self._upstream_change(last, *key.partition("/")[::2])

        return differences(last.manifest["ingredients"], ingredients, self._recipe, inside)

    def _upstream_change(self, last: Artifact, asset: str, part: str) -> str | None:
        node = NODES.get(asset)
        before = self._store.get(self._recipe.name, asset, last.inputs.get(asset, ""))
        return node.part_change(before, self._upstream(asset), part) if node and before else None
