"""Checks before the first step of a run: a run that cannot finish does not start."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from finetune_assets.lineage.cost import Cost
from finetune_assets.lineage.estimate import costs
from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.plan import make_plan
from finetune_assets.machine.disk import free_bytes, same_disk
from finetune_assets.recipe import Recipe
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.reporting.printable import human_size
from finetune_assets.store.artifact_store import ArtifactStore

WEIGHTS = ("base_model", "lora_adapter", "merged_model", "gguf_file")


def check_prerequisites(
    recipe: Recipe, project: Project, store: ArtifactStore, assets: Collection[str], *, forced: Collection[str] = ()
) -> None:
    """Refuse a run that cannot finish, as far as that can be known.

    Args:
        assets: the assets to materialise unless they are fresh.
        forced: the assets to materialise in any case.

    Raises:
        StepFailed: the disk is too small for them, or OLLAMA_HOST names something that is not an Ollama server.
    """
    for name in assets:
        NODES[name].check_ready()
    _check_disk(recipe, project, store, assets, forced)


def _check_disk(
    recipe: Recipe, project: Project, store: ArtifactStore, assets: Collection[str], forced: Collection[str]
) -> None:
    """Compare the free space with what the run writes.

    A `maybe` asset counts if weights that it is made from are made again: it will run then. ollama_model does not
    count: the project's own Ollama store links the weights, and a server writes to its own disk.
    """
    plan = make_plan(recipe, project, store, upto="gguf_file")
    selected = {*assets, *forced}
    fetches = "base_model" in selected and (plan["base_model"].artifact is None or "base_model" in forced)
    needed: dict[str, Cost] = {}
    for name, cost in costs(recipe, project, plan, store, also=forced, ask_hub=fetches).items():
        anew = any(up.asset in needed and up.asset in WEIGHTS for up in NODES[name].upstreams)
        if name in selected and (anew or plan[name].state != "maybe"):
            needed[name] = cost
    parts = {name: cost.bytes for name, cost in needed.items() if cost.bytes}
    scratch = max((cost.scratch for cost in needed.values()), default=0)
    for name, cost in needed.items():
        if (download := cost.download) is not None:
            fetched = {f"the download of {name}": download.bytes}
            if same_disk(download.cache, project.store):
                parts |= fetched
            else:
                _check_room(recipe, fetched, 0, download.cache, "set HF_HOME")
    _check_room(recipe, parts, scratch, project.store, "run finetune gc, or set DAGSTER_HOME")


def _check_room(recipe: Recipe, parts: Mapping[str, int], scratch: int, folder: Path, advice: str) -> None:
    size = sum(parts.values()) + scratch
    if size > (free := free_bytes(folder)):
        temporary = {"temporary files": scratch} if scratch else {}
        listed = ", ".join(f"{name} {human_size(part)}" for name, part in {**parts, **temporary}.items())
        raise StepFailed(
            f"not enough disk space for {recipe.name}: about {human_size(size)} are needed ({listed}), and "
            f"{human_size(free)} are free on the disk of {folder}",
            f"{advice} to a folder on a larger disk",
        )
