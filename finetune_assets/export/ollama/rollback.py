"""Serve an earlier model again: from its GGUF file, and with the template, system prompt and parameters on record."""

from __future__ import annotations

from pathlib import Path

from finetune_assets.export.ollama.publish import serve, serving_problem
from finetune_assets.machine.disk import disk_trouble
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import BadInput, StepFailed
from finetune_assets.reporting.events import Message, Progress
from finetune_assets.store.artifact import Artifact
from finetune_assets.store.artifact_store import ArtifactStore

ASSET = "ollama_model"


def rollback(
    recipe: str,
    project: Project,
    store: ArtifactStore,
    progress: Progress,
    *,
    to: str | None = None,
) -> Artifact:
    """Put an earlier model in place, on the server that answers, else in our own store, and make it the current one.

    Args:
        progress: told each stage, in words.
        to: the beginning of its fingerprint; None: the one made before the present one.

    Raises:
        BadInput: no artifact, or more than one, begins with `to`.
        StepFailed: there is no earlier model, what it was made of is gone, or it cannot be served.
    """
    if not store.published(recipe, ASSET):
        raise StepFailed(f"{recipe}/{ASSET} has not been made yet", f"finetune run {recipe}")
    try:
        with store.lock(recipe, ASSET):
            target = _chosen(store, recipe, to)
            present = store.current(recipe, ASSET)
            place = serve(
                target.metrics,
                weights_of(store, recipe, target),
                before=present.metrics if present is not None else {},
                models=project.ollama_models,
                progress=lambda event: progress(event) if isinstance(event, Message) else None,
            )
            facts = {**target.metrics, **place}
            if (problem := serving_problem(facts, project.ollama_models)) is not None:
                raise StepFailed(f"{recipe}/{ASSET} {target.fingerprint} was put in place, but {problem}", "try again")
            # a server's digest of a model is not our store's: the manifest says under which it is served now
            target = store.amend(target, facts)
            store.make_current(target)
            return target
    except OSError as error:
        failure = disk_trouble(error, store.folder(recipe, ASSET), outcome="ask `finetune plan` what is served")
        raise (failure or error) from error


def _chosen(store: ArtifactStore, recipe: str, to: str | None) -> Artifact:
    made = store.published(recipe, ASSET)
    listing = "made so far: " + ", ".join(f"{artifact.fingerprint} ({artifact.created[:16]})" for artifact in made)
    if to is not None:
        found = [artifact for artifact in made if to and artifact.fingerprint.startswith(to)]
        if len(found) != 1:
            what = "several artifacts begin" if found else "no artifact begins"
            raise BadInput(f"--to: {what} with {to!r} in {recipe}/{ASSET}", listing)
        return found[0]
    present = store.current(recipe, ASSET)
    if present is None:
        raise StepFailed(f"which model of {recipe} was served last is not on record", f"say --to; {listing}")
    earlier = [artifact for artifact in made if artifact.created < present.created]
    if not earlier:
        raise StepFailed(f"no model of {recipe} was made before {present.fingerprint}", f"say --to; {listing}")
    return earlier[-1]


def weights_of(store: ArtifactStore, recipe: str, target: Artifact) -> Path:
    """Return the folder of the GGUF files that an ollama_model is made of.

    Raises:
        StepFailed: they are gone, or damaged.
    """
    fingerprint = target.inputs["gguf_file"]
    gguf = store.get(recipe, "gguf_file", fingerprint)
    damage = "it is gone" if gguf is None else gguf.damage(store.digests)
    if gguf is None or damage is not None:
        raise StepFailed(
            f"{recipe}/{ASSET} {target.fingerprint} cannot be served again: of its weights, "
            f"{recipe}/gguf_file {fingerprint}: {damage}",
            "give the recipe the values of then (the manifests name them), and finetune run makes them again",
        )
    return gguf.path
