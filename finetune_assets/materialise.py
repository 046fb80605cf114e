"""Run one step of a lineage: find its inputs, build in a staging folder, publish; or find that it is all there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune_assets.artifacts import Artifact, ArtifactStore, Made
from finetune_assets.device import Device, choose_device
from finetune_assets.errors import StepFailed
from finetune_assets.identity import fingerprint
from finetune_assets.lineage import NODES
from finetune_assets.plan import Planned, make_plan, open_store, sources_of
from finetune_assets.project import Project
from finetune_assets.recipe import Recipe

Progress = Callable[[dict[str, Any]], None]
ChooseDevice = Callable[[bool | None, bool | None], Device]
RECORDED = ("dagster", "finetune-assets", "gguf", "libgguf", "nltk", "peft", "torch", "transformers", "trl")


@dataclass(frozen=True)
class Step:
    """What the body of a step is given.

    Args:
        inputs: the artifact of every upstream asset.
        staging: an empty folder; what the body leaves there becomes the artifact.
        previous: the artifact this asset was last materialised to if it is whole, for parts that can be kept.
        ingredients: those of the fingerprint of what is being made.
        progress: tells whoever watches how it goes.
        choose_device: (bf16, fp16) -> the device to compute on.
    """

    recipe: Recipe
    project: Project
    inputs: Mapping[str, Artifact]
    staging: Path
    previous: Artifact | None
    ingredients: Mapping[str, Any]
    progress: Progress
    choose_device: ChooseDevice


@dataclass(frozen=True)
class Outcome:
    """A published artifact, and whether it was there already."""

    artifact: Artifact
    reused: bool


def materialise(
    asset: str,
    recipe: Recipe,
    project: Project,
    body: Callable[[Step], Made],
    progress: Progress,
    *,
    choose_device: ChooseDevice = choose_device,
    force: bool = False,
) -> Outcome:
    """Make the asset's artifact unless it is published and whole, and record it as the current one.

    Raises:
        StepFailed: an upstream was never made, or the body failed; nothing is published then.
    """
    node, store = NODES[asset], open_store(project)
    plan = make_plan(recipe, project, store)
    if plan[asset].artifact is not None and not force:
        return _done(store, plan[asset].artifact)
    inputs = {up.asset: _input(up.asset, plan, recipe, store) for up in node.upstreams}
    wanted = fingerprint(node, recipe, inputs, sources_of(node, recipe, project, store.digests))
    with store.building(recipe.name, asset, wanted.hex) as staging:
        # another run may have published it while this one waited for the lock
        artifact = make_plan(recipe, project, store)[asset].artifact
        if artifact is not None and artifact.fingerprint == wanted.hex and not force:
            return _done(store, artifact)
        for name, used in inputs.items():
            # found before the lock was held, which is what keeps a collection from removing them
            if not used.path.is_dir():
                raise StepFailed(f"{recipe.name}/{name} {used.fingerprint} was removed meanwhile", "run again")
        started = time.monotonic()
        previous = store.current(recipe.name, asset)
        if previous is not None and (force or previous.damage(store.digests) is not None):
            previous = None
        made = body(Step(recipe, project, inputs, staging, previous, wanted.ingredients, progress, choose_device))
        record = {
            "seed": recipe.train.seed,
            "seconds": round(time.monotonic() - started, 1),
            "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "libraries": {name: metadata.version(name) for name in RECORDED},
            "inputs": {name: used.fingerprint for name, used in inputs.items()},
        }
        artifact = store.publish(staging, recipe.name, asset, wanted, made, record)
        store.make_current(artifact)
        return Outcome(artifact, reused=False)


def _done(store: ArtifactStore, artifact: Artifact | None) -> Outcome:
    assert artifact is not None
    store.make_current(artifact)
    return Outcome(artifact, reused=True)


def _input(asset: str, plan: Mapping[str, Planned], recipe: Recipe, store: ArtifactStore) -> Artifact:
    """The upstream's artifact for today's recipe; when it is out of date and was left out of the run, its last one."""
    found = plan[asset].artifact or store.current(recipe.name, asset)
    if found is None:
        raise StepFailed(f"{recipe.name}/{asset} has not been made yet", f"materialise {recipe.name}/{asset} first")
    if (damage := found.damage(store.digests)) is not None:
        raise StepFailed(f"{recipe.name}/{asset} is damaged: {damage}", f"materialise {recipe.name}/{asset} again")
    return found
