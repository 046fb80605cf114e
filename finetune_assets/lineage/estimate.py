"""What a run would take: seconds, by past runs and what drives the work, and bytes on disk. Estimates, not promises.

An asset goes by what it was made last; one that was never made goes by the same asset of another recipe in the store.
What there is nothing to go by for is None.
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
    """What a run takes; `at_most`: with the assets that may come out as they were.

    `untimed` and `unsized` are the assets that are not in the seconds, or not in the bytes.
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
        also: assets that are to be made although they are fresh.
        ask_hub: ask the hub about a base model that was never made.
    """
    known = Known(recipe, project, plan, store, ask_hub=ask_hub)
    return {name: _cost(name, known) for name, item in plan.items() if item.state != "fresh" or name in also}


def _cost(name: str, known: Known) -> Cost:
    """Return the cost of an asset; unknown where the manifest of a past run lacks what this release records."""
    try:
        node = NODES[name]
        return node.cost(node, known)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
        return UNKNOWN


def total(plan: Mapping[str, Planned], costs: Mapping[str, Cost]) -> Total:
    """Return the sum over the assets that will run, and the sum with those that may."""
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
