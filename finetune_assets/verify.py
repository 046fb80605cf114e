"""Whether what is served now is what was made: looked at again, name by name, where it was put."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune_assets.artifacts import Artifact, ArtifactStore
from finetune_assets.digests import DigestCache
from finetune_assets.errors import StepFailed
from finetune_assets.export import ollama_checks, ollama_server
from finetune_assets.export.modelfile import OllamaModel
from finetune_assets.export.ollama_checks import Check
from finetune_assets.export.serving import digests_of, recorded
from finetune_assets.project import Project

ASSET = "ollama_model"
PATIENCE = 600.0  # seconds for an answer: a busy CPU server takes its time to load a model


def verify(
    recipe: str, project: Project, store: ArtifactStore, progress: Callable[[dict[str, Any]], None]
) -> dict[str, list[Check]]:
    """Check what was put in place last: in our own store if it went there, and on the server if one answers.

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
            progress({"event": "message", "text": f"reading {name} in {models}"})
            found[f"{name} in the store {models}"] = ollama_checks.in_store(models, model, digests_of(facts)[name])
    host = ollama_server.configured_host()
    if ollama_server.answers(host) is not None:
        there = ollama_server.digests(host)
        for name, model in wanted.items():
            progress({"event": "message", "text": f"asking {name} on {host}"})
            digest = there.get(ollama_server.listed(name))
            served = Check("digest", digest == digests_of(facts)[name], digest or "no such model")
            rest = _on_server(host, model, ask=all(check.ok for check in checks)) if digest else []
            found[f"{name} on the server {host}"] = [served, *rest]
    elif facts["where"] == "server":
        advice = f"none answers; it was put on {facts['place']}: start that one, or set OLLAMA_HOST to it"
        found[f"{recipe} on the server {host}"] = [Check("server", False, advice)]
    return found


def _whole(name: str, fingerprint: str, artifact: Artifact | None) -> Check:
    why = "it is gone" if artifact is None else artifact.damage(DigestCache(None))
    return Check(f"{name} {fingerprint}", why is None, why or "its files are as published")


def _on_server(host: str, model: OllamaModel, *, ask: bool) -> list[Check]:
    """All that is checked before a model takes over. `ask`: its file is whole, so that llama.cpp can be asked, too."""
    import httpx
    from ollama import Client, ResponseError

    from finetune_assets.export.expected import expected

    checks: list[Check] = []
    try:
        checks = ollama_checks.written(ollama_server.show(host, model.name), model)
        if ask:
            client = Client(host=host, timeout=PATIENCE, trust_env=False)
            checks += ollama_checks.answered(client, model.name, expected(model))
        return checks
    except (ResponseError, httpx.HTTPError, OSError) as error:
        return [*checks, Check("answer", False, f"the server gives none: {error}")]
