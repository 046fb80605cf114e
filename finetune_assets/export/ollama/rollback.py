"""Rollback to an earlier Ollama model, from its GGUF file and its recorded template, system prompt and parameters."""

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
    """Publish an earlier model again, on the server that answers, else in the project's own store, and make it current.

    Args:
        progress: receives a message for each stage.
        to: the beginning of its fingerprint; None: the model before the current one.

    Raises:
        BadInput: no artifact, or more than one, begins with `to`.
        StepFailed: there is no earlier model, its GGUF file is missing or damaged, or it cannot be served.
    """
    if not store.published(recipe, ASSET):
        raise StepFailed(f"{recipe}/{ASSET} has not been made yet", f"finetune run {recipe}")
    try:
        with store.lock(recipe, ASSET):
            target = _chosen(store, recipe, to)
            current = store.current(recipe, ASSET)
            place = serve(
                target.metrics,
                weights_of(store, recipe, target),
                before=current.metrics if current is not None else {},
                models=project.ollama_models,
                progress=lambda event: progress(event) if isinstance(event, Message) else None,
            )
            facts = {**target.metrics, **place}
            if (problem := serving_problem(facts, project.ollama_models)) is not None:
                raise StepFailed(
                    f"{recipe}/{ASSET} {target.fingerprint} was published, but {problem}", "run the rollback again"
                )
            # A server's digest of a model differs from the store's: the manifest records the digest served now.
            target = store.amend(target, facts)
            store.make_current(target)
            return target
    except OSError as error:
        failure = disk_trouble(error, store.folder(recipe, ASSET), outcome="run `finetune plan` to see what is served")
        raise (failure or error) from error


def _chosen(store: ArtifactStore, recipe: str, to: str | None) -> Artifact:
    artifacts = store.published(recipe, ASSET)
    listing = "published so far: " + ", ".join(
        f"{artifact.fingerprint} ({artifact.created[:16]})" for artifact in artifacts
    )
    if to is not None:
        matches = [artifact for artifact in artifacts if to and artifact.fingerprint.startswith(to)]
        if len(matches) != 1:
            what = "several artifacts begin" if matches else "no artifact begins"
            raise BadInput(f"--to: {what} with {to!r} in {recipe}/{ASSET}", listing)
        return matches[0]
    current = store.current(recipe, ASSET)
    if current is None:
        raise StepFailed(f"there is no record of the last served model of {recipe}", f"set --to; {listing}")
    earlier = [artifact for artifact in artifacts if artifact.created < current.created]
    if not earlier:
        raise StepFailed(f"{recipe} has no model older than {current.fingerprint}", f"set --to; {listing}")
    return earlier[-1]


def weights_of(store: ArtifactStore, recipe: str, target: Artifact) -> Path:
    """Return the folder of the GGUF files of an ollama_model.

    Raises:
        StepFailed: they are missing or damaged.
    """
    fingerprint = target.inputs["gguf_file"]
    gguf = store.get(recipe, "gguf_file", fingerprint)
    damage = "it is gone" if gguf is None else gguf.damage(store.digests)
    if gguf is None or damage is not None:
        raise StepFailed(
            f"{recipe}/{ASSET} {target.fingerprint} cannot be served again: "
            f"its weights, {recipe}/gguf_file {fingerprint}: {damage}",
            "restore the recipe's earlier values (see the manifests), then finetune run materialises them again",
        )
    return gguf.path
