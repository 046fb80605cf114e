"""A GGUF file becomes an Ollama model: on the server that answers, else in a model store of our own.

A server started with that store as its OLLAMA_MODELS serves it as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune_assets.errors import FinetuneError, StepFailed
from finetune_assets.export import ollama_server, ollama_store
from finetune_assets.recipe import OllamaSection


def publish(
    gguf: Path,
    chat: Path,
    section: OllamaSection,
    *,
    system: str | None,
    models: Path,
    out: Path,
    progress: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Serve `gguf` under the section's name and write its Modelfile to `out`; facts for the manifest.

    Args:
        chat: chat.json of the model, for its stop texts.
        models: our own Ollama model store.

    Returns:
        name, file (of the weights), template, system, parameters, the Modelfile's text, notes on what the TEMPLATE
        cannot do, and what `serve` says.

    Raises:
        StepFailed: no faithful TEMPLATE can be derived from the chat template, or the server fails.
        BadInput: a text cannot be written into a Modelfile.
    """
    from finetune_assets.export.go_template import from_gguf
    from finetune_assets.export.modelfile import modelfile, parameters

    template = from_gguf(gguf)
    options = parameters(section, json.loads(chat.read_text(encoding="utf-8"))["stop"])
    text = modelfile(str(gguf), template=template.text, system=system, parameters=options)
    facts = {
        "name": section.name,
        "file": gguf.name,
        "template": template.text,
        "system": system,
        "parameters": options,
        "notes": list(template.notes),
        "modelfile": text,
    }
    place = serve(gguf, facts, models=models, progress=progress)
    (out / "Modelfile").write_text(text, encoding="utf-8")
    return {**facts, **place}


def serve(
    gguf: Path, facts: Mapping[str, Any], *, models: Path, progress: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Put a model in place: on the server that answers, else in our own store.

    Args:
        facts: name, template, system and parameters, as in what `publish` returns.

    Returns:
        digest (of the Ollama manifest), where ("server" or "store"), place (host or folder), and the commands that
        talk to the model.

    Raises:
        StepFailed: the server fails, or serves something else than was asked for.
    """
    name, system = facts["name"], facts["system"]
    host = ollama_server.configured_host()
    if ollama_server.answers(host) is not None:
        from finetune_assets.chat.engines import prompt_tokens

        opening = [{"role": "system", "content": system}] if system else []
        made = ollama_server.create(
            host,
            name,
            gguf,
            template=facts["template"],
            system=system,
            parameters=facts["parameters"],
            probe_tokens=prompt_tokens(gguf, [*opening, *ollama_server.QUESTION]),
            progress=lambda line: progress({"event": "message", "text": line}),
        )
        where, place, commands = "server", host, [f"ollama run {name}"]
    else:
        models.mkdir(parents=True, exist_ok=True)
        with ollama_store.lock(models):
            made = ollama_store.write(
                models, name, gguf, template=facts["template"], system=system, parameters=facts["parameters"]
            )
        where, place = "store", str(models)
        commands = [f"OLLAMA_MODELS={models} ollama serve   # then: ollama run {name}"]
    return {"digest": made.digest, "where": where, "place": place, "commands": commands}


def served_digests(name: str, models: Path) -> set[str]:
    """The digests under which a model of this name is served now: by the server that answers, and by our own store.

    Raises:
        StepFailed: something answers that is no Ollama server.
        OSError: the server answers no longer.
    """
    host = ollama_server.configured_host()
    there = ollama_server.digest(host, name) if ollama_server.answers(host) is not None else None
    return {found for found in (there, ollama_store.read(models, name)) if found is not None}


def unused_blobs(models: Path) -> list[Path]:
    """Files in our own store that belong to no model, to be removed with the store's lock held.

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
    """Why a model that `publish` put in place is not what would be served now, or None if it is.

    Args:
        facts: what `publish` returned.
        models: our own Ollama model store.
    """
    name, wanted = facts["name"], facts["digest"]
    host = ollama_server.configured_host()
    try:
        served = ollama_server.answers(host) is not None
        found = ollama_server.digest(host, name) if served else ollama_store.read(models, name)
    except (FinetuneError, OSError) as error:
        return f"the Ollama server at {host} cannot be asked: {error}"
    place = f"the Ollama server at {host}" if served else f"the Ollama store {models}"
    if found is None:
        return f"{place} has no model {name}"
    if found != wanted:
        return f"{place} serves another {name}: {found[:12]} instead of {wanted[:12]}"
    return None
