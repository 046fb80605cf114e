"""The place of a recipe's chain in a Dagster project: the names before its nodes, its owners, its resource."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from finetune_assets.recipe import Recipe


@dataclass(frozen=True)
class Mount:
    """How a recipe's chain stands in a Dagster project. The defaults are those of this repository's own project.

    Args:
        prefix: parts of every asset key before the recipe's name; jobs, sensors and schedules begin with them too.
        group: the asset group of the eight assets; the recipe's name if not given.
        owners: of every node, in place of the default ones.
        tags: of every node, besides its own.
        gpu: the key of the resource that says where to compute.
        own_datasets: the data sets are nodes of this chain alone, not shared with other recipes.
        read: reads the recipe as it is now; not given, its file in `configs/` is read.
    """

    prefix: tuple[str, ...] = ()
    group: str | None = None
    owners: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    gpu: str = "gpu"
    own_datasets: bool = False
    read: Callable[[], Recipe] | None = None


OWNERS = ("team:fine-tuning",)
HOME = Mount()
"""The project that loads the recipes of its own `configs/`."""
