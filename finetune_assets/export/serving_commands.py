"""Commands that serve artifacts with other programs and send a question, for users to copy.

Ollama's model holds everything that the recipe says. llama.cpp's server and vLLM find the chat template and the tokens
that end an answer in the file or folder. System prompt, further stop texts and sampling go with each request.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_assets.inputs.json_text import read_model_json
from finetune_assets.models.formats.gguf import context_of_gguf
from finetune_assets.recipe import Recipe
from finetune_assets.reporting.errors import FinetuneError
from finetune_assets.store.artifact import Artifact

OLLAMA = "http://127.0.0.1:11434"  # where its server listens and its client looks if nobody says otherwise
LLAMA_SERVER = "http://127.0.0.1:8080"
VLLM = "http://127.0.0.1:8000"
QUESTION = "Who are you?"
THEN = "# and, while that runs, in another terminal:"


def commands(asset: str, artifact: Artifact, recipe: Recipe, models: Path) -> list[str]:
    """Return shell commands that serve an asset's artifact and send a question; none for other assets.

    Args:
        models: our own Ollama model store, where it is now.
    """
    try:
        return _commands(asset, artifact, recipe, models)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, FinetuneError) as error:
        return [f"# cannot be served: {' '.join(str(error).split()) or type(error).__name__}"]


def _commands(asset: str, artifact: Artifact, recipe: Recipe, models: Path) -> list[str]:
    match asset:
        case "ollama_model":
            facts = artifact.metrics
            address = OLLAMA if facts["where"] == "store" else facts["place"]
            return [*ollama(facts, models), _ask(address, {"model": facts["name"]}, [])]
        case "gguf_file":
            return _llama_server(artifact, recipe)
        case "merged_model":
            return _vllm(artifact.path, recipe)
    return []


def ollama(facts: Mapping[str, Any], models: Path) -> list[str]:
    """Return the commands that open a conversation with what `ollama.publish` published.

    Args:
        models: our own Ollama model store, where it is now.
    """
    names = [name.removesuffix(":latest") for name in facts.get("models", {f"{facts['name']}:latest": None})]
    if facts["where"] == "store":
        asked = facts.get("asked", OLLAMA)
        why = [] if asked == OLLAMA else [f"# no Ollama server answered at {asked}"]
        serve = f"OLLAMA_MODELS={_quoted(models)} ollama serve"
        return [*why, serve, THEN, *(f"ollama run {name}" for name in names)]
    host = "" if facts["place"] == OLLAMA else f"OLLAMA_HOST={shlex.quote(facts['place'])} "
    return [f"{host}ollama run {name}" for name in names]


def _llama_server(artifact: Artifact, recipe: Recipe) -> list[str]:
    types = {kind: entry["file"] for kind, entry in artifact.metrics["types"].items()}
    file = artifact.path / types.get(recipe.served_type, next(iter(types.values())))
    others = [name for name in types.values() if name != file.name]
    return [
        *([f"# or with one of {', '.join(others)} in its place:"] if others else []),
        f"llama-server -m {_quoted(file)} --jinja --alias {recipe.ollama.name} "
        f"-c {_context(recipe, context_of_gguf(file))} {_listening(LLAMA_SERVER)}",
        THEN,
        _ask(LLAMA_SERVER, _request(recipe, "repeat_penalty"), _system(recipe)),
    ]


def _vllm(folder: Path, recipe: Recipe) -> list[str]:
    config = read_model_json(folder / "config.json")
    longest = config.get("text_config", config).get("max_position_embeddings")
    return [
        f"vllm serve {_quoted(folder)} --served-model-name {recipe.ollama.name} "
        f"--chat-template {_quoted(folder / 'chat_template.jinja')} "
        f"--max-model-len {_context(recipe, longest)} {_listening(VLLM)}",
        THEN,
        _ask(VLLM, _request(recipe, "repetition_penalty"), _system(recipe)),
    ]


def _context(recipe: Recipe, longest: int | None) -> int:
    """Return the context to serve with: vLLM refuses to start with more than the model's."""
    return min(recipe.ollama.num_ctx, longest or recipe.ollama.num_ctx)


def _listening(address: str) -> str:
    host, _, port = address.removeprefix("http://").partition(":")
    return f"--host {host} --port {port}"


def _request(recipe: Recipe, penalty: str) -> dict[str, Any]:
    """Return a request without its messages. `penalty`: the program's name for Ollama's repeat_penalty."""
    section = recipe.ollama
    options = {
        "stop": section.stop or None,
        "temperature": section.temperature,
        "top_p": section.top_p,
        "top_k": section.top_k,
        penalty: section.repeat_penalty,
    }
    return {"model": section.name} | {key: value for key, value in options.items() if value is not None}


def _system(recipe: Recipe) -> list[dict[str, str]]:
    return [{"role": "system", "content": recipe.system}] if recipe.system else []


def _ask(address: str, request: Mapping[str, Any], opening: list[dict[str, str]]) -> str:
    """Return a request to an endpoint that is compatible with OpenAI's."""
    messages = [*opening, {"role": "user", "content": QUESTION}]
    body = json.dumps({**request, "messages": messages}, ensure_ascii=False)
    return f"curl {address}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
