"""Estimates of what a run takes: seconds, scaled from past runs, and bytes on disk.

An asset is estimated from its own last run; one that was never made, from the same asset of a different recipe in the
store. None: there is no past run to estimate from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from finetune_assets.lineage.cost import UNKNOWN, Cost, Known
from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.planned import Planned
from finetune_assets.recipe import Recipe
from finetune_assets.recipe.project import Project
from finetune_assets.store.artifact_store import ArtifactStore


@dataclass(frozen=True)
class Total:
    """The cost of a run; `at_most`: with the `maybe` assets.

    `untimed` and `unsized` are the assets that the seconds, or the bytes, do not include.
    """

    seconds: float
    seconds_at_most: float
    bytes: int
    bytes_at_most: int
    scratch: int
    untimed: tuple[str, ...]
    unsized: tuple[str, ...]


def costs(
    recipe: Recipe,
    project: Project,
    plan: Mapping[str, Planned],
    store: ArtifactStore,
    *,
    also: Collection[str] = (),
    ask_hub: bool = False,
) -> dict[str, Cost]:
    """Return the cost of every asset of a plan that is not fresh.

    Args:
        also: assets to materialise although they are fresh.
        ask_hub: ask the hub about a base model that was never made.
    """
    known = Known(recipe, project, plan, store, ask_hub=ask_hub)
    return {name: _cost(name, known) for name, item in plan.items() if item.state != "fresh" or name in also}


def _cost(name: str, known: Known) -> Cost:
    """Return the cost of an asset; unknown if the manifest of a past run lacks what this release records."""
    try:
        node = NODES[name]
        return node.cost(node, known)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
        return UNKNOWN


def total(plan: Mapping[str, Planned], costs: Mapping[str, Cost]) -> Total:
    """Add up the assets that will run, and, for `at_most`, those that may."""
    will = [cost for name, cost in costs.items() if plan[name].state != "maybe"]
    return Total(
        seconds=sum(cost.seconds or 0 for cost in will),
        seconds_at_most=sum(cost.seconds or 0 for cost in costs.values()),
        bytes=sum(cost.bytes or 0 for cost in will),
        bytes_at_most=sum(cost.bytes or 0 for cost in costs.values()),
        scratch=max((cost.scratch for cost in costs.values()), default=0),
        untimed=tuple(name for name, cost in costs.items() if cost.seconds is None),
        unsized=tuple(name for name, cost in costs.items() if cost.bytes is None),
    )
