"""Materialise one asset: find its inputs, build in a staging folder, publish; or reuse a published artifact."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.identity import fingerprint
from finetune_assets.lineage.plan import invalid_reason, make_plan, open_store, sources_of
from finetune_assets.lineage.planned import Planned
from finetune_assets.recipe import Recipe
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.reporting.events import Progress, message
from finetune_assets.store.artifact import Artifact, Made
from finetune_assets.store.artifact_store import ArtifactStore
from finetune_assets.worker import launch as process
from finetune_assets.worker.tasks.task import Task

Launch = Callable[[Task, Progress], dict[str, Any]]
RECORDED = (
    *("accelerate", "dagster", "finetune-assets", "gguf", "jieba", "nltk"),
    *("peft", "torch", "transformers", "trl", "xllamacpp"),
)


@dataclass(frozen=True)
class Step:
    """The arguments of a step's body.

    Args:
        inputs: the artifact of every upstream asset.
        staging: an empty folder; the files that the body writes there become the artifact.
        previous: the last artifact of this asset if it is whole, for parts that can be kept.
        ingredients: those of the fingerprint of the artifact being built.
        progress: reports events of the step.
        launch: runs a task in a child process and returns its report.
    """

    recipe: Recipe
    project: Project
    inputs: Mapping[str, Artifact]
    staging: Path
    previous: Artifact | None
    ingredients: Mapping[str, Any]
    progress: Progress
    launch: Callable[[Task], dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """A published artifact, the upstream artifacts that it is made from, and whether it existed before."""

    artifact: Artifact
    inputs: Mapping[str, Artifact]
    reused: bool


def materialise(
    asset: str,
    recipe: Recipe,
    project: Project,
    body: Callable[[Step], Made],
    progress: Progress,
    *,
    launch: Launch = process.run,
    force: bool = False,
) -> Outcome:
    """Make the asset's artifact unless a valid one is published, and record it as the current one.

    Args:
        launch: runs tasks of the body in child processes and passes on their events.

    Raises:
        StepFailed: an upstream was never made, or the body failed; nothing is published.
    """
    node, store = NODES[asset], open_store(project)
    plan = make_plan(recipe, project, store, upto=asset)
    inputs = {up.asset: _input(up.asset, plan, recipe, store) for up in node.upstreams}
    if (artifact := plan[asset].artifact) is not None and not force:
        return _done(store, artifact, inputs)
    _agree(recipe, inputs)
    sources = sources_of(node, recipe, project, store.digests)
    wanted = fingerprint(node, recipe, inputs, sources)
    waiting = message(f"waits for another run that is making {recipe.name}/{asset}")
    with store.building(recipe.name, asset, wanted.hex, lambda: progress(waiting)) as staging:
        # a different run may have published it while this one waited; stale inputs may have been used before, too
        artifact = store.get(recipe.name, asset, wanted.hex)
        if artifact is not None and not force and invalid_reason(artifact, project, store.digests) is None:
            return _done(store, artifact, inputs)
        _still_there(recipe, inputs)
        started = time.monotonic()
        previous = None if force else _previous(recipe, asset, store)
        step = Step(
            recipe,
            project,
            inputs,
            staging,
            previous,
            wanted.ingredients,
            progress,
            lambda task: launch(task, progress),
        )
        made = body(step)
        if sources_of(node, recipe, project, store.digests) != sources:
            raise StepFailed(f"what {recipe.name}/{asset} reads was changed while it was read", "run again")
        _still_whole(recipe, inputs, store)
        record = _record(recipe, inputs, seconds=time.monotonic() - started)
        artifact = store.publish(staging, recipe.name, asset, wanted, made, record)
        store.make_current(artifact)
        return Outcome(artifact, inputs, reused=False)


def _done(store: ArtifactStore, artifact: Artifact, inputs: Mapping[str, Artifact]) -> Outcome:
    store.make_current(artifact)
    return Outcome(artifact, inputs, reused=True)


def _record(recipe: Recipe, inputs: Mapping[str, Artifact], *, seconds: float) -> dict[str, Any]:
    return {
        "seed": recipe.train.seed,
        "seconds": round(seconds, 1),
        "libraries": {name: metadata.version(name) for name in RECORDED},
        "inputs": {name: used.fingerprint for name, used in inputs.items()},
    }


def _previous(recipe: Recipe, asset: str, store: ArtifactStore) -> Artifact | None:
    """Return the artifact that the asset was last materialised to, if it is whole."""
    previous = store.current(recipe.name, asset)
    return previous if previous is not None and previous.damage(store.digests) is None else None


def _still_there(recipe: Recipe, inputs: Mapping[str, Artifact]) -> None:
    """Check that the inputs still exist: they were chosen before the lock was held that protects them from gc.

    Raises:
        StepFailed: one was removed in the meantime.
    """
    for name, used in inputs.items():
        if not used.path.is_dir():
            raise StepFailed(f"{recipe.name}/{name} {used.fingerprint} was removed in the meantime", "run again")


def _input(asset: str, plan: Mapping[str, Planned], recipe: Recipe, store: ArtifactStore) -> Artifact:
    """Return the upstream's artifact for today's recipe, or its last one if it is stale and not part of the run."""
    artifact = plan[asset].artifact or store.current(recipe.name, asset)
    if artifact is None:
        raise StepFailed(f"{recipe.name}/{asset} has not been made yet", f"materialise {recipe.name}/{asset} first")
    if (damage := artifact.damage(store.digests)) is not None:
        raise StepFailed(f"{recipe.name}/{asset} is damaged: {damage}", f"materialise {recipe.name}/{asset} again")
    return artifact


def _still_whole(recipe: Recipe, inputs: Mapping[str, Artifact], store: ArtifactStore) -> None:
    """Check the inputs again. Files that the step linked are read once more here, so that no plan has to.

    Raises:
        StepFailed: one was changed while the step read it.
    """
    for name, used in inputs.items():
        store.digests.settle(used.path / file for file in used.manifest["files"])
        if (damage := used.damage(store.digests)) is not None:
            raise StepFailed(
                f"{recipe.name}/{name} was changed while it was read: {damage}",
                f"materialise {recipe.name}/{name} again",
            )


def _agree(recipe: Recipe, inputs: Mapping[str, Artifact]) -> None:
    """Refuse inputs that do not belong together: an adapter must not be scored on rows that it was trained on.

    Raises:
        StepFailed: one input was made from a different version of a second input.
    """
    for name, used in inputs.items():
        for key, version in used.manifest["ingredients"]["upstreams"].items():
            other, _, part = key.partition("/")
            if (current := inputs.get(other)) is None:
                continue
            if version != (current.manifest["parts"].get(part) if part else current.data_version):
                raise StepFailed(
                    f"{recipe.name}/{name} was made from a different {key} than the current one",
                    f"materialise {recipe.name}/{name} as well",
                )
