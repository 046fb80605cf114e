"""The assets, the job and the schedule of one recipe."""

from __future__ import annotations

import re
from pathlib import Path

import dagster as dg

from finetune_assets.assets.base_model import BASE_MODEL
from finetune_assets.assets.dataset_info import DATASET_INFO
from finetune_assets.assets.eval_metrics import EVAL_METRICS
from finetune_assets.assets.gguf_file import GGUF_FILE
from finetune_assets.assets.lora_adapter import LORA_ADAPTER
from finetune_assets.assets.merged_model import MERGED_MODEL
from finetune_assets.assets.ollama_model import OLLAMA_MODEL
from finetune_assets.assets.raw_dataset import RAW_DATASET
from finetune_assets.assets.step_asset import StepAsset, define
from finetune_assets.errors import BadInput
from finetune_assets.project import Project
from finetune_assets.recipe import Recipe
from resources.gpu import GpuResource

STEPS: tuple[StepAsset, ...] = (
    RAW_DATASET,
    DATASET_INFO,
    BASE_MODEL,
    LORA_ADAPTER,
    EVAL_METRICS,
    MERGED_MODEL,
    GGUF_FILE,
    OLLAMA_MODEL,
)


def job_name(recipe: str) -> str:
    return f"{recipe}_job"


def recipe_definitions(recipe: Recipe, project: Project) -> dg.Definitions:
    """Everything that Dagster shows of a recipe."""
    job = dg.define_asset_job(
        job_name(recipe.name),
        selection=dg.AssetSelection.groups(recipe.name),
        description=f"Bring every asset of the recipe {recipe.name} up to date.",
        tags={"recipe": recipe.name},
    )
    schedules = []
    if recipe.schedule.cron is not None:
        schedules.append(
            dg.ScheduleDefinition(
                name=f"{recipe.name}_schedule",
                job=job,
                cron_schedule=recipe.schedule.cron,
                execution_timezone=recipe.schedule.execution_timezone,
                default_status=dg.DefaultScheduleStatus.RUNNING,
            )
        )
    return dg.Definitions(assets=[define(step, recipe, project) for step in STEPS], jobs=[job], schedules=schedules)


def bound(*chains: dg.Definitions) -> dg.Definitions:
    """Chains with what they run on: the device, and this process (heavy work has processes of its own)."""
    return dg.Definitions.merge(
        *chains, dg.Definitions(resources={"gpu": GpuResource()}, executor=dg.in_process_executor)
    )


def broken_recipe(path: Path, error: BadInput) -> dg.Definitions:
    """A stand-in for a recipe that cannot be read: visible in the lineage, and it says why when it is run."""
    name = re.sub(r"\W", "_", path.stem)

    @dg.asset(
        key=[name, "recipe"],
        group_name=name,
        description=f"**This recipe cannot be read.**\n\n```\n{error}\n```",
        kinds={"yaml"},
    )
    def recipe() -> None:
        raise dg.Failure(description=str(error), allow_retries=False)

    return dg.Definitions(assets=[recipe])
