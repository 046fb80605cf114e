"""Publication of GGUF files as Ollama models: on the server that answers, else in the project's own model store.

A server whose OLLAMA_MODELS is that store can use it directly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_assets.export.ollama import model_store as ollama_store
from finetune_assets.export.ollama.modelfile import OllamaModel, modelfile, parameters
from finetune_assets.export.ollama.server import api as ollama_server
from finetune_assets.models.formats.gguf import context_of_gguf
from finetune_assets.recipe import Recipe
from finetune_assets.reporting.errors import FinetuneError, StepFailed
from finetune_assets.reporting.events import Progress, message
from finetune_assets.store.artifact import Artifact

ROOM = 256  # bytes of a short question with the template's text around it; it cannot have more tokens than bytes
RECORDED = ("name", "models", "template", "system", "parameters")
OWN_STORE = "the project's own"  # recorded instead of a path, because the project may move


def publish(
    recipe: Recipe, gguf: Artifact, *, models: Path, out: Path, before: Mapping[str, Any], progress: Progress
) -> dict[str, Any]:
    """Publish the recipe's models, write a Modelfile for each to `out`, and return facts for the manifest.

    Args:
        gguf: the gguf_file artifact, undamaged.
        models: the project's own Ollama model store.
        before: the facts of the last publication; tags that the recipe no longer has are removed.

    Returns:
        name (without a tag), models (by name with its tag: type, file and sha256 of the weights), template, system,
        parameters, modelfile (text of the first one), prompts (how servers render them, as text), notes (settings that
        cannot be followed), and what `serve` returns.

    Raises:
        StepFailed: no TEMPLATE can reproduce the chat template with this system prompt, or the server fails.
    """
    from finetune_assets.export.ollama.template.proof import prove_file

    files = {name: (kind, gguf.metrics["types"][kind]["file"]) for name, kind in recipe.served.items()}
    first = gguf.path / files[f"{recipe.ollama.name}:latest"][1]
    proof, longest = prove_file(first, recipe.system), context_of_gguf(first)
    template, notes = proof.template, proof.notes
    if longest is not None and recipe.ollama.num_ctx > longest:
        notes.append(
            f"ollama.num_ctx is {recipe.ollama.num_ctx}, but the model was made for {longest} tokens: servers use that"
        )
    stop = json.loads((gguf.path / "chat.json").read_text(encoding="utf-8"))["stop"]
    facts: dict[str, Any] = {
        "name": recipe.ollama.name,
        "models": {
            name: {"type": kind, "file": file, "sha256": gguf.manifest["files"][file]["sha256"]}
            for name, (kind, file) in files.items()
        },
        "template": template.text,
        "system": template.system,
        "parameters": parameters(recipe.ollama, stop),
        "prompts": proof.way,
        "notes": notes,
    }
    place = serve(facts, gguf.path, before=before, models=models, progress=progress)
    # relative to the Modelfile, where `ollama create` looks
    beside = Path("..", "..", gguf.path.parent.name, gguf.path.name)
    texts = {name: modelfile(model) for name, model in recorded(facts, beside).items()}
    for name, text in texts.items():
        suffix = "" if name.endswith(":latest") else f".{name.partition(':')[2]}"
        (out / f"Modelfile{suffix}").write_text(text, encoding="utf-8")
    return {**facts, "modelfile": next(iter(texts.values())), **place}


def recorded(facts: Mapping[str, Any], folder: Path) -> dict[str, OllamaModel]:
    """Return the models that recorded facts describe, by name; their weights are in `folder`.

    Raises:
        StepFailed: an earlier release wrote the facts, and recorded less.
    """
    if missing := [key for key in RECORDED if key not in facts]:
        raise StepFailed(
            f"{facts.get('name')} was published by an earlier release, which did not record its {missing[0]}",
            "restore the recipe's earlier values (see its manifest), then finetune run --force --to ollama_model",
        )
    common = {key: facts[key] for key in ("template", "system", "parameters")}
    return {
        name: OllamaModel(name, folder / entry["file"], entry["sha256"], **common)
        for name, entry in facts["models"].items()
    }


def serve(
    facts: Mapping[str, Any], folder: Path, *, before: Mapping[str, Any], models: Path, progress: Progress
) -> dict[str, Any]:
    """Publish models on the server that answers, else in the project's own store.

    Args:
        facts: as `publish` returns them.
        folder: the folder of the weights.
        before: the facts of the last publication; tags that the recipe no longer has are removed.

    Returns:
        digests (name with its tag -> digest of the Ollama manifest), digest (that of the first), previous (name ->
        digest served under it until now, or none), where ("server" or "store"), place (a host, or OWN_STORE),
        asked (the host that was checked for a server), and served (how a server serves each model).

    Raises:
        StepFailed: the server fails or serves a different model, or the system prompt leaves no room in the context.
    """
    from finetune_assets.export.ollama.expected_answer import NUM_CTX, expected

    published = recorded(facts, folder)
    same_base = before.get("name") == facts["name"]
    retired = {name: old for name, old in digests_of(before).items() if name not in published} if same_base else {}
    host = ollama_server.configured_host()
    if ollama_server.answers(host) is not None:
        from finetune_assets.export.ollama.create import create

        progress(message("asking llama.cpp what to expect"))
        replies = {name: expected(model) for name, model in published.items()}
        created = create(host, list(published.values()), replies, retired=retired, progress=progress)
        previous = {name: one.previous for name, one in created.items()}
        digests = {name: one.digest for name, one in created.items()}
        ways = {name: {"by": str(one.behaviour), "weights": one.behaviour.digest} for name, one in created.items()}
        where, place = "server", host
    else:
        model = next(iter(published.values()))
        if len((model.system or "").encode()) + ROOM > model.parameters.get("num_ctx", NUM_CTX):
            expected(model)  # counts the tokens
        models.mkdir(parents=True, exist_ok=True)
        with ollama_store.lock(models):
            previous = {name: ollama_store.read(models, name) for name in published}
            written = ollama_store.write(models, list(published.values()))
            for name, old in retired.items():
                if ollama_store.read(models, name) == old:
                    ollama_store.remove(models, name)
        digests = {name: one.digest for name, one in written.items()}
        ways = {}
        where, place = "store", OWN_STORE
    first = next(iter(digests.values()))
    return {
        **{"digest": first, "digests": digests, "previous": previous, "where": where, "place": place, "asked": host},
        "served": ways,
    }


def place_of(facts: Mapping[str, Any], models: Path) -> str:
    """Return the host or folder that models are served from now. Earlier releases recorded a folder, now outdated.

    Args:
        facts: as `publish` returned them.
        models: the project's own Ollama model store.
    """
    return str(models) if facts["where"] == "store" else str(facts["place"])


def digests_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the recorded digests, by name with its tag; earlier releases recorded only that of the plain name."""
    return facts.get("digests") or ({f"{facts['name']}:latest": facts["digest"]} if "digest" in facts else {})


def served_digests(name: str, models: Path) -> set[str]:
    """Return the digests that a name has now: on the server that answers, and in the project's own store.

    Raises:
        StepFailed: the host answers, but is not an Ollama server.
        OSError: the server stopped answering.
    """
    host = ollama_server.configured_host()
    there = ollama_server.digest(host, name) if ollama_server.answers(host) is not None else None
    return {known for known in (there, ollama_store.read(models, name)) if known is not None}


def unused_blobs(models: Path) -> list[Path]:
    """Return the files of the project's own store that no model uses. Hold the store's lock to remove them.

    Raises:
        StepFailed: a running server may be using the store, and may be receiving a model.
        OSError: the server stopped answering.
    """
    host = ollama_server.configured_host()
    # a server that uses this store lists exactly its models
    if ollama_server.answers(host) is not None and (
        set(ollama_server.digests(host).values()) <= ollama_store.digests(models)
    ):
        raise StepFailed(f"the Ollama server at {host} may be running over this store")
    return ollama_store.unreferenced(models)


def serving_problem(facts: Mapping[str, Any], models: Path) -> str | None:
    """Return why the models that `publish` published are no longer what is served, or None if they are.

    Args:
        facts: what `publish` returned.
        models: the project's own Ollama model store.
    """
    host = ollama_server.configured_host()
    try:
        served = ollama_server.digests(host) if ollama_server.answers(host) is not None else None
    except (FinetuneError, OSError) as error:
        return f"the Ollama server at {host} cannot be asked: {error}"
    place = f"the Ollama server at {host}" if served is not None else f"the Ollama store {models}"
    for name, expected in digests_of(facts).items():
        present = served.get(ollama_server.listed(name)) if served is not None else ollama_store.read(models, name)
        if present is None:
            return f"{place} has no model {_plain(name)}"
        if present != expected:
            return f"{place} serves another {_plain(name)}: {present[:12]} instead of {expected[:12]}"
    return None


def _plain(name: str) -> str:
    """Return a name without its tag if that is latest, as users type it."""
    return name.removesuffix(":latest")
