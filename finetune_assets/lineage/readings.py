"""Versions of all that a lineage reads: of the recipe values of each asset, of its data files, of everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.identity import own_ingredients
from finetune_assets.lineage.plan import make_plan, open_store, sources_of
from finetune_assets.lineage.planned import Planned
from finetune_assets.recipe import Recipe
from finetune_assets.recipe.project import Project
from finetune_assets.store.digests import digest_of

LENGTH = 20  # hex digits, as in a data version
FILES = "raw_dataset"  # the asset whose sources are data files


@dataclass(frozen=True)
class Reading:
    """The values that an asset reads from outside the lineage, now or when its artifact was made.

    Args:
        values: recipe values, tool versions and sources other than data files.
        files: data set -> digest of its registry entry and its file.
        invalid_reason: why the published artifact for these values is no longer valid.
    """

    values: Mapping[str, Any]
    files: Mapping[str, str]
    invalid_reason: str | None = None

    @property
    def version(self) -> str:
        """Equal for equal values; different while the artifact is invalid."""
        return digest_of([dict(self.values), self.invalid_reason] if self.invalid_reason else dict(self.values))[
            :LENGTH
        ]


def reading_of(asset: str, ingredients: Mapping[str, Any], invalid_reason: str | None = None) -> Reading:
    """Return the reading that the ingredients of a fingerprint record."""
    files = dict(ingredients["sources"]) if asset == FILES else {}
    values = {key: ingredients[key] for key in ("recipe", "tools")}
    return Reading(
        {**values, "sources": {} if files else dict(ingredients["sources"])},
        {name: digest[:LENGTH] for name, digest in files.items()},
        invalid_reason,
    )


@dataclass(frozen=True)
class Observed:
    """A recipe, its plan and its readings, all of the same moment."""

    recipe: Recipe
    project: Project
    plan: Mapping[str, Planned]
    readings: Mapping[str, Reading]

    @property
    def stale(self) -> list[str]:
        """The assets that a run has to visit, upstreams first."""
        return [name for name, item in self.plan.items() if item.state != "fresh"]

    @property
    def target(self) -> str:
        """One version of all that decides the result of a full run, code included."""
        parts = {
            name: [NODES[name].code_version, item.version, dict(item.files)] for name, item in self.readings.items()
        }
        return digest_of(parts)[:LENGTH]


def observe(recipe: Recipe, project: Project) -> Observed:
    """Read the versions of everything that a recipe's assets read.

    Raises:
        BadInput: a source is missing or invalid.
    """
    store = open_store(project)
    plan = make_plan(recipe, project, store)
    readings = {}
    for name, node in NODES.items():
        ingredients = own_ingredients(node, recipe, sources_of(node, recipe, project, store.digests))
        item = plan[name]
        published = item.wanted is not None and store.get(recipe.name, name, item.wanted) is not None
        invalid_reason = "; ".join(item.reasons) if published and item.state != "fresh" else None
        readings[name] = reading_of(name, ingredients, invalid_reason)
    return Observed(recipe, project, plan, readings)
