"""The description of one asset: all that the lineage knows about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from finetune_assets.lineage.cost import UNKNOWN, Cost, Known
from finetune_assets.recipe import Recipe
from finetune_assets.recipe.project import Project
from finetune_assets.store.artifact import Artifact
from finetune_assets.store.digests import DigestCache


@dataclass(frozen=True)
class Upstream:
    """An asset that a node reads: all of it, or only the parts named for a recipe."""

    asset: str
    parts: Callable[[Recipe], tuple[str, ...]] | None = None


def _no_sources(recipe: Recipe, project: Project, digests: DigestCache) -> Mapping[str, str]:
    return {}


def _no_problem(artifact: Artifact, project: Project) -> str | None:
    return None


def _untold_source(artifact: Artifact, recipe: Recipe, project: Project, source: str) -> str | None:
    return None


def _untold_part(before: Artifact, after: Artifact, part: str) -> str | None:
    return None


def _no_headline(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    return {}


def _unknown_cost(node: Node, known: Known) -> Cost:
    return UNKNOWN


def _always_ready() -> None:
    return None


def _never_in_use(project: Project) -> Callable[[Artifact], str | None]:
    return lambda artifact: None


@dataclass(frozen=True)
class Node:
    """One asset of a lineage: the ingredients of its fingerprint, and all else that differs between assets.

    Args:
        reads: recipe keys (`section` or `section.key`) whose values belong to the fingerprint.
        tools: versions of the tools that decide the bytes that the step writes, by name.
        sources: digests of what the step reads from outside the lineage, by name.
        source_change: describes what changed in a source since an artifact was made; None: unknown.
        part_change: describes what changed in a part between two artifacts; None: unknown.
        problem: says why an artifact whose files are intact is no longer valid, or None.
        headline: selects the metrics to show first.
        cost: estimates the cost of making the artifact.
        check_ready: raises StepFailed before a run if the step could not succeed.
        in_use: given a project, returns a function: why gc must keep an artifact, or None.
    """

    name: str
    reads: tuple[str, ...]
    upstreams: tuple[Upstream, ...] = ()
    tools: Callable[[], Mapping[str, str]] = dict
    code_version: str = "1"
    sources: Callable[[Recipe, Project, DigestCache], Mapping[str, str]] = _no_sources
    source_change: Callable[[Artifact, Recipe, Project, str], str | None] = _untold_source
    part_change: Callable[[Artifact, Artifact, str], str | None] = _untold_part
    problem: Callable[[Artifact, Project], str | None] = _no_problem
    headline: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _no_headline
    cost: Callable[[Node, Known], Cost] = _unknown_cost
    check_ready: Callable[[], None] = _always_ready
    in_use: Callable[[Project], Callable[[Artifact], str | None]] = _never_in_use


def metrics_named(*names: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return a headline of these metrics, as far as they are recorded; a dot selects a key of a mapping."""

    def headline(metrics: Mapping[str, Any]) -> dict[str, Any]:
        values = {name: _value(metrics, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    return headline


def _value(metrics: Mapping[str, Any], name: str) -> Any:
    value: Any = metrics
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def exact_versions(*packages: str) -> dict[str, str]:
    """Return the full version of each package."""
    return {name: metadata.version(name) for name in packages}


def minor_versions(*packages: str) -> dict[str, str]:
    """Return the major and minor version of each package: patch releases and builds for other devices do not count."""
    return {name: ".".join(version.split(".")[:2]) for name, version in exact_versions(*packages).items()}
