"""The Dagster definitions of one recipe, and those that all recipes share."""

from __future__ import annotations

from collections.abc import Sequence

import dagster as dg

from finetune_assets.assets.all_assets import STEPS
from finetune_assets.assets.automation.sensors import failure_sensor, observe_sensor, retrain_sensor, schedule
from finetune_assets.assets.automation.sources import dataset_nodes, values_nodes
from finetune_assets.assets.keys import HOME, Mount, asset_key, job_name
from finetune_assets.assets.step_asset import define
from finetune_assets.recipe import Recipe
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import FinetuneError, clean
from resources.gpu import GpuResource
from resources.webhook import WebhookResource


def recipe_definitions(recipe: Recipe, project: Project, mount: Mount = HOME) -> dg.Definitions:
    """Return everything that Dagster shows of a recipe, except its data sets."""
    job = dg.define_asset_job(
        job_name(recipe.name, mount),
        # by key: the group of one recipe's values (x_config) may also be the group of a recipe named x_config
        selection=dg.AssetSelection.assets(*(asset_key(recipe, step.name, mount) for step in STEPS)),
        description=f"Bring every asset of the recipe {recipe.name} up to date.",
        tags={"recipe": recipe.name},
        executor_def=dg.in_process_executor,
    )
    return dg.Definitions(
        assets=[*(define(step, recipe, project, mount) for step in STEPS), values_nodes(recipe, project, mount)],
        jobs=[job],
        sensors=[retrain_sensor(recipe, project, mount)],
        schedules=[schedule(recipe, project, mount)] if recipe.schedule.cron is not None else [],
    )


def shared_definitions(recipes: Sequence[Recipe], project: Project, mount: Mount = HOME) -> dg.Definitions:
    """Return the definitions that exist once for all recipes."""
    return dg.Definitions(
        assets=dataset_nodes(recipes, project, mount), sensors=[observe_sensor(project), failure_sensor()]
    )


def bound(*chains: dg.Definitions) -> dg.Definitions:
    """Merge chains with their resources and executor: steps run in this process, heavy work in child processes."""
    return dg.Definitions.merge(
        *chains,
        dg.Definitions(resources={"gpu": GpuResource(), "webhook": WebhookResource()}, executor=dg.in_process_executor),
    )


def broken_recipe(name: str, word: str, error: FinetuneError) -> dg.Definitions:
    """Return one asset in place of a broken recipe; it appears in the lineage, and running it reports the error.

    Args:
        word: the recipe's name in Dagster.
    """
    message = str(error)
    shown = message.replace("```", "~~~")

    @dg.asset(
        key=[word, "recipe"],
        group_name=word,
        description=f"**The recipe {clean(name)} cannot be read.**\n\n```\n{shown}\n```",
        kinds={"yaml"},
    )
    def recipe() -> None:
        raise dg.Failure(description=message, allow_retries=False)

    return dg.Definitions(assets=[recipe])
