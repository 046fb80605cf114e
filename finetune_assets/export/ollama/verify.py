"""The check that what is served now is what was made, for each name and where it was published."""

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
PATIENCE = 600.0  # seconds for an answer: a busy CPU server takes its time to load a model


def verify(recipe: str, project: Project, store: ArtifactStore, progress: Progress) -> dict[str, list[Check]]:
    """Check what was published last: in our own store if it is there, and on the server if one answers.

    Of the artifacts and of our own store every byte is read again. A server is asked for its account of each model, and
    a question, whose answer llama.cpp gives, too.

    Returns:
        The checks of the record, and of each model by its name and place, in words.

    Raises:
        StepFailed: nothing was put in place yet, the record is an earlier release's, or something answers that is no
            Ollama server.
    """
    artifact = store.current(recipe, ASSET)
    if artifact is None:
        raise StepFailed(f"{recipe}/{ASSET} has not been made yet", f"finetune run {recipe}")
    facts, models = artifact.metrics, project.ollama_models
    checks = [_whole(ASSET, artifact.fingerprint, artifact)]
    for name, fingerprint in artifact.inputs.items():
        checks.append(_whole(name, fingerprint, store.get(recipe, name, fingerprint)))
    found = {f"{recipe}: the record": checks}
    wanted = recorded(facts, store.folder(recipe, "gguf_file") / artifact.inputs["gguf_file"])
    if facts["where"] == "store":
        for name, model in wanted.items():
            progress(message(f"reading {name} in {models}"))
            found[f"{name} in the store {models}"] = ollama_checks.in_store(models, model, digests_of(facts)[name])
    host = ollama_server.configured_host()
    if (version := ollama_server.answers(host)) is not None:
        there = ollama_server.digests(host)
        for name, model in wanted.items():
            progress(message(f"asking {name} on {host}"))
            digest = there.get(ollama_server.listed(name))
            served = Check("digest", digest == digests_of(facts)[name], digest or "no such model")
            whole = all(check.ok for check in checks)
            record = facts.get("served", {}).get(name, {})  # an earlier release kept none
            rest = _on_server(host, version, model, record, ask=whole) if digest else []
            found[f"{name} on the server {host}"] = [served, *rest]
    elif facts["where"] == "server":
        advice = f"none answers; it was put on {facts['place']}: start that one, or set OLLAMA_HOST to it"
        found[f"{recipe} on the server {host}"] = [Check("server", False, advice)]
    return found


def _whole(name: str, fingerprint: str, artifact: Artifact | None) -> Check:
    why = "it is gone" if artifact is None else artifact.damage(DigestCache(None))
    return Check(f"{name} {fingerprint}", why is None, why or "its files are as published")


def _on_server(host: str, version: str, model: OllamaModel, record: Mapping[str, Any], *, ask: bool) -> list[Check]:
    """Run all checks that a model passes before it takes over.

    Args:
        record: how it was served when it was put there.
        ask: its file is whole, so that llama.cpp can be asked, too.
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
            found = behaviour(host, version, model.name, model, reply)
            checks = [Check("served by", True, str(found)), *checks]
            checks += ollama_checks.answered(client, model.name, reply, found)
        return checks
    except (ResponseError, httpx.HTTPError, OSError) as error:
        return [*checks, Check("answer", False, f"the server gives none: {error}")]


def _weights(host: str, version: str, shown: Mapping[str, Any], model: OllamaModel, record: Mapping[str, Any]) -> Check:
    """Check the weights, and that a server's own copy is the one from when the model was published."""
    check = ollama_checks.weights(host, version, model.name, shown, model)
    digest, made = source_of(shown), record.get("weights")
    if check.ok and made is not None and digest not in (made, model.sha256):
        return Check("weights", False, f"the server made {made[:12]} of them, and holds {str(digest)[:12]} now")
    return check
