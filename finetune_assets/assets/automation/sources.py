"""Data sets and recipe values as nodes of Dagster's graph: where the lineage begins.

A sensor (sensors.py) and the button in the UI observe them. Both read the current files, so the code location need not
be reloaded.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import dagster as dg

from finetune_assets.assets.automation.events import observations
from finetune_assets.assets.keys import DATA_VERSION, HOME, OWNERS, Mount, file_key, group_name, stem, values_key
from finetune_assets.assets.node_metadata import values_listing
from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.readings import observe
from finetune_assets.recipe import DATASETS, Recipe
from finetune_assets.recipe.file import load_recipe, recipe_path
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import FinetuneError, unforeseen
from finetune_assets.reporting.masking import masked_error


def values_nodes(recipe: Recipe, project: Project, mount: Mount = HOME) -> dg.AssetsDefinition:
    """Return the nodes of a recipe's values: for each asset, one with the values that it reads."""
    specs = [
        dg.AssetSpec(
            values_key(recipe, node.name, mount),
            description=f"The recipe values that `{node.name}` reads, as they were when the code location was loaded. "
            f"Each observation has those of its moment.\n\n{values_listing(node, recipe)}",
            group_name=f"{group_name(recipe, mount)}_config",
            kinds={"yaml"},
            owners=list(mount.owners or OWNERS),
            tags=mount.tags,
        )
        for node in NODES.values()
    ]

    def observe_values(context: dg.AssetExecutionContext) -> Iterator[dg.ObserveResult]:
        yield from _seen(context, [recipe], project, mount)

    return _observable(f"{stem(recipe.name, mount)}__config", specs, observe_values)


def dataset_nodes(recipes: Sequence[Recipe], project: Project, mount: Mount = HOME) -> list[dg.AssetsDefinition]:
    """Return a node for each data set that a recipe names."""
    readers = {file_key(recipe, name, mount): recipe for recipe in recipes for name in recipe.dataset.dataset}
    specs = [
        dg.AssetSpec(
            key,
            description=f"A data set in `{recipe.dataset.dataset_dir}`: its file, and its entry in dataset_info.json.",
            group_name=f"{group_name(recipe, mount)}_{DATASETS}" if mount.own_datasets else DATASETS,
            kinds={"json"},
            owners=list(mount.owners or OWNERS),
            tags=mount.tags,
        )
        for key, recipe in readers.items()
    ]

    def observe_datasets(context: dg.AssetExecutionContext) -> Iterator[dg.ObserveResult]:
        selected = {readers[key].name: readers[key] for key in sorted(context.selected_asset_keys)}
        yield from _seen(context, list(selected.values()), project, mount)

    name = f"{stem(recipes[0].name, mount)}__{DATASETS}" if mount.own_datasets else f"{DATASETS}__files"
    return [_observable(name, specs, observe_datasets)] if specs else []


def _observable(name: str, specs: Sequence[dg.AssetSpec], observe: Callable[..., Any]) -> dg.AssetsDefinition:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)  # Dagster marks all observable nodes as beta
        return dg.multi_observable_source_asset(name=name, specs=specs, can_subset=True)(observe)


def recipe_now(recipe: Recipe, project: Project, mount: Mount) -> Recipe:
    """Read a recipe again: it may have changed since the code location was loaded.

    Raises:
        BadInput: it can no longer be read, or is invalid.
    """
    return mount.read() if mount.read else load_recipe(recipe_path(recipe.name, project.configs))


def _seen(
    context: dg.AssetExecutionContext, recipes: Sequence[Recipe], project: Project, mount: Mount
) -> Iterator[dg.ObserveResult]:
    left = set(context.selected_asset_keys)
    for recipe in recipes:
        try:
            events = list(observations(observe(recipe_now(recipe, project, mount), project), mount))
        except Exception as error:
            known = (
                error if isinstance(error, FinetuneError) else unforeseen(error, f"the observation of {recipe.name}")
            )
            raise dg.Failure(description=str(known), allow_retries=False) from masked_error(error)
        for event in events:
            if event.asset_key in left:
                left.remove(event.asset_key)
                version = dg.DataVersion((event.tags or {})[DATA_VERSION])
                yield dg.ObserveResult(asset_key=event.asset_key, data_version=version, metadata=event.metadata)
