"""The check that each served model is the published one, in the place where it was published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_assets.export.ollama import served_checks as ollama_checks
from finetune_assets.export.ollama.behaviour import behaviour
from finetune_assets.export.ollama.modelfile import OllamaModel
from finetune_assets.export.ollama.publish import digests_of, recorded
from finetune_assets.export.ollama.served_checks import Check
from finetune_assets.export.ollama.server import api as ollama_server
from finetune_assets.export.ollama.weights import source_of
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.reporting.events import Progress, message
from finetune_assets.store.artifact import Artifact
from finetune_assets.store.artifact_store import ArtifactStore
from finetune_assets.store.digests import DigestCache

ASSET = "ollama_model"
PATIENCE = 600.0  # seconds for an answer: a busy CPU server loads a model slowly


def verify(recipe: str, project: Project, store: ArtifactStore, progress: Progress) -> dict[str, list[Check]]:
    """Check the last publication: in the project's own store if it is there, and on the server if one answers.

    Reads every byte of the artifacts and of the store again. Compares the server's description of each model with the
    record, and its answer to a question with llama.cpp's answer.

    Returns:
        The checks of the record, and of each model, by a text with its name and place.

    Raises:
        StepFailed: nothing was published yet, an earlier release wrote the record, or the host is not an Ollama
            server.
    """
    artifact = store.current(recipe, ASSET)
    if artifact is None:
        raise StepFailed(f"{recipe}/{ASSET} has not been made yet", f"finetune run {recipe}")
    facts, models = artifact.metrics, project.ollama_models
    checks = [_whole(ASSET, artifact.fingerprint, artifact)]
    for name, fingerprint in artifact.inputs.items():
        checks.append(_whole(name, fingerprint, store.get(recipe, name, fingerprint)))
    results = {f"{recipe}: the record": checks}
    published = recorded(facts, store.folder(recipe, "gguf_file") / artifact.inputs["gguf_file"])
    if facts["where"] == "store":
        for name, model in published.items():
            progress(message(f"reading {name} in {models}"))
            results[f"{name} in the store {models}"] = ollama_checks.in_store(models, model, digests_of(facts)[name])
    host = ollama_server.configured_host()
    if (version := ollama_server.answers(host)) is not None:
        listed = ollama_server.digests(host)
        for name, model in published.items():
            progress(message(f"checking {name} on {host}"))
            digest = listed.get(ollama_server.listed(name))
            served = Check("digest", digest == digests_of(facts)[name], digest or "no such model")
            whole = all(check.ok for check in checks)
            record = facts.get("served", {}).get(name, {})  # earlier releases did not record it
            rest = _on_server(host, version, model, record, ask=whole) if digest else []
            results[f"{name} on the server {host}"] = [served, *rest]
    elif facts["where"] == "server":
        advice = f"no server answers; the models are on {facts['place']}: start that server, or set OLLAMA_HOST to it"
        results[f"{recipe} on the server {host}"] = [Check("server", False, advice)]
    return results


def _whole(name: str, fingerprint: str, artifact: Artifact | None) -> Check:
    why = "it is gone" if artifact is None else artifact.damage(DigestCache(None))
    return Check(f"{name} {fingerprint}", why is None, why or "its files are as published")


def _on_server(host: str, version: str, model: OllamaModel, record: Mapping[str, Any], *, ask: bool) -> list[Check]:
    """Run the checks that a model must pass before it replaces the served one.

    Args:
        record: how it was served when it was published.
        ask: compare answers, too, which needs an undamaged file for llama.cpp.
    """
    import httpx
    from ollama import Client, ResponseError

    from finetune_assets.export.ollama.expected_answer import expected

    checks: list[Check] = []
    try:
        shown = ollama_server.show(host, model.name)
        checks = ollama_checks.written(shown, model, _weights(host, version, shown, model, record))
        if ask:
            client, reply = Client(host=host, timeout=PATIENCE, trust_env=False), expected(model)
            served = behaviour(host, version, model.name, model, reply)
            checks = [Check("served by", True, str(served)), *checks]
            checks += ollama_checks.answered(client, model.name, reply, served)
        return checks
    except (ResponseError, httpx.HTTPError, OSError) as error:
        return [*checks, Check("answer", False, f"the server did not answer: {error}")]


def _weights(host: str, version: str, shown: Mapping[str, Any], model: OllamaModel, record: Mapping[str, Any]) -> Check:
    """Check the weights, and that a server's own copy has not changed since publication."""
    check = ollama_checks.weights(host, version, model.name, shown, model)
    digest, copied = source_of(shown), record.get("weights")
    if check.ok and copied is not None and digest not in (copied, model.sha256):
        return Check("weights", False, f"the server stored them as {copied[:12]}, and has {str(digest)[:12]} now")
    return check
