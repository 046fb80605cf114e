"""Publication of GGUF files as Ollama models: on the server that answers, else in the project's own model store.

A server with that store as its OLLAMA_MODELS can use it directly.
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

ROOM = 256  # bytes, and therefore tokens at most, of a short question with the words that a template puts around it
RECORDED = ("name", "models", "template", "system", "parameters")
OWN_STORE = "the project's own"  # on record in place of a path, which is another one once the project has moved


def publish(
    recipe: Recipe, gguf: Artifact, *, models: Path, out: Path, before: Mapping[str, Any], progress: Progress
) -> dict[str, Any]:
    """Serve what the recipe asks for, and write a Modelfile of each to `out`; facts for the manifest.

    Args:
        gguf: the gguf_file artifact, whole.
        models: our own Ollama model store.
        before: what this returned the last time; tags that are wanted no longer are taken away.

    Returns:
        name (without a tag), models (by name with its tag: type, file and sha256 of the weights), template, system,
        parameters, the text of the first's Modelfile, prompts (how servers make them, in words), notes on what will not
        be as asked for, and what `serve` returns.

    Raises:
        StepFailed: no TEMPLATE renders the chat template with this system prompt, or the server fails.
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
    """Return the models that facts on record speak of, by name; their weights lie in `folder`.

    Raises:
        StepFailed: the facts are an earlier release's, which recorded less.
    """
    if missing := [key for key in RECORDED if key not in facts]:
        raise StepFailed(
            f"{facts.get('name')} was made by an earlier release, which did not record its {missing[0]}",
            "give the recipe the values of then (its manifest names them), and finetune run --force --to ollama_model",
        )
    common = {key: facts[key] for key in ("template", "system", "parameters")}
    return {
        name: OllamaModel(name, folder / entry["file"], entry["sha256"], **common)
        for name, entry in facts["models"].items()
    }


def serve(
    facts: Mapping[str, Any], folder: Path, *, before: Mapping[str, Any], models: Path, progress: Progress
) -> dict[str, Any]:
    """Put models in place: on the server that answers, else in our own store.

    Args:
        facts: as `publish` returns them.
        folder: where the weights lie.
        before: the facts of what was put in place last: tags that are wanted no longer are taken away.

    Returns:
        digests (name with its tag -> digest of the Ollama manifest), digest (that of the first), previous (name ->
        digest served under it until now, or none), where ("server" or "store"), place (a host, or OWN_STORE), and
        asked (the host that was looked for a server).

    Raises:
        StepFailed: the server fails, or serves something else than was asked for; or the system prompt leaves no room
            in the context.
    """
    from finetune_assets.export.ollama.expected_answer import NUM_CTX, expected

    wanted = recorded(facts, folder)
    same_base = before.get("name") == facts["name"]
    retired = {name: old for name, old in digests_of(before).items() if name not in wanted} if same_base else {}
    host = ollama_server.configured_host()
    if ollama_server.answers(host) is not None:
        from finetune_assets.export.ollama.create import create

        progress(message("asking llama.cpp what to expect"))
        replies = {name: expected(model) for name, model in wanted.items()}
        made = create(host, list(wanted.values()), replies, retired=retired, progress=progress)
        previous = {name: one.previous for name, one in made.items()}
        digests = {name: one.digest for name, one in made.items()}
        ways = {name: {"by": str(one.behaviour), "weights": one.behaviour.digest} for name, one in made.items()}
        where, place = "server", host
    else:
        model = next(iter(wanted.values()))
        if len((model.system or "").encode()) + ROOM > model.parameters.get("num_ctx", NUM_CTX):
            expected(model)  # counts the tokens
        models.mkdir(parents=True, exist_ok=True)
        with ollama_store.lock(models):
            previous = {name: ollama_store.read(models, name) for name in wanted}
            written = ollama_store.write(models, list(wanted.values()))
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
    """Return the host or folder that models are served from now. An earlier release recorded the folder of its day.

    Args:
        facts: as `publish` returned them.
        models: our own Ollama model store.
    """
    return str(models) if facts["where"] == "store" else str(facts["place"])


def digests_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests on record, by name with its tag; an earlier release recorded that of the plain name alone."""
    return facts.get("digests") or ({f"{facts['name']}:latest": facts["digest"]} if "digest" in facts else {})


def served_digests(name: str, models: Path) -> set[str]:
    """Return the digests that a name has now: on the server that answers, and in our own store.

    Raises:
        StepFailed: something answers that is not an Ollama server.
        OSError: the server answers no longer.
    """
    host = ollama_server.configured_host()
    there = ollama_server.digest(host, name) if ollama_server.answers(host) is not None else None
    return {found for found in (there, ollama_store.read(models, name)) if found is not None}


def unused_blobs(models: Path) -> list[Path]:
    """Return files in our own store that belong to no model, to be removed with the store's lock held.

    Raises:
        StepFailed: a running server may be using the store; it may just be taking in a model.
        OSError: the server answers no longer.
    """
    host = ollama_server.configured_host()
    # a server over our store lists our models, and no others
    if ollama_server.answers(host) is not None and (
        set(ollama_server.digests(host).values()) <= ollama_store.digests(models)
    ):
        raise StepFailed(f"the Ollama server at {host} may be running over this store")
    return ollama_store.unreferenced(models)


def serving_problem(facts: Mapping[str, Any], models: Path) -> str | None:
    """Return why models that `publish` put in place are not what would be served now, or None if they are.

    Args:
        facts: what `publish` returned.
        models: our own Ollama model store.
    """
    host = ollama_server.configured_host()
    try:
        served = ollama_server.digests(host) if ollama_server.answers(host) is not None else None
    except (FinetuneError, OSError) as error:
        return f"the Ollama server at {host} cannot be asked: {error}"
    place = f"the Ollama server at {host}" if served is not None else f"the Ollama store {models}"
    for name, wanted in digests_of(facts).items():
        found = served.get(ollama_server.listed(name)) if served is not None else ollama_store.read(models, name)
        if found is None:
            return f"{place} has no model {_plain(name)}"
        if found != wanted:
            return f"{place} serves another {_plain(name)}: {found[:12]} instead of {wanted[:12]}"
    return None


def _plain(name: str) -> str:
    """Return a name as people type it."""
    return name.removesuffix(":latest")
