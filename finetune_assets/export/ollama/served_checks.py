"""Named checks that a model on a server or in the project's own store is the published one."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.export.ollama import model_store as ollama_store
from finetune_assets.export.ollama import weights as ollama_weights
from finetune_assets.export.ollama.behaviour import Behaviour
from finetune_assets.export.ollama.expected_answer import SLACK, TOLD, Expected
from finetune_assets.export.ollama.modelfile import OllamaModel
from finetune_assets.reporting.first_difference import first_difference
from finetune_assets.store.digests import digest_of_file

if TYPE_CHECKING:
    from ollama import ChatResponse, Client, Message

# Limit of the total variation between two engines' distributions of the first token. Their kernels round differently:
# see CLEAR in expected_answer.
FURTHEST = 0.1
THINKING_MARKS = re.compile(r"\s*</?think>\s*")


@dataclass(frozen=True)
class Check:
    """The result of one check; `found` describes the actual state."""

    name: str
    ok: bool
    found: str


def written(shown: Mapping[str, Any], model: OllamaModel, weights: Check | None = None) -> list[Check]:
    """Check a server's description of a model (/api/show): weights, template, system message, parameters.

    Args:
        weights: the result for the weights; None: compare only their digest with the file's.
    """
    parameters = _read_parameters(shown.get("parameters", ""))
    wanted = {key: value if isinstance(value, list) else [value] for key, value in model.parameters.items()}
    stops, wanted_stops = parameters.pop("stop", []), wanted.pop("stop", [])
    return [
        weights or _same("weights", ollama_weights.source_of(shown), model.sha256),
        _same("template", shown.get("template", ""), model.template),
        _same("system", shown.get("system", ""), model.system or ""),
        # without stop texts from the model, a server may choose its own
        _same("stops", sorted(stops) if wanted_stops else [], sorted(wanted_stops)),
        _same("parameters", parameters, {key: list(map(_number, values)) for key, values in wanted.items()}),
    ]


def weights(host: str, version: str, name: str, shown: Mapping[str, Any], model: OllamaModel) -> Check:
    """Check the weights on a server: the recorded digest, or equal content. OSError if the server is gone."""
    if ollama_weights.source_of(shown) == model.sha256:
        return Check("weights", True, "as on record")
    same, found = ollama_weights.compare_content(host, name, shown, model.gguf, model.sha256, version)
    return Check("weights", same, found)


def answered(
    client: Client,
    name: str,
    expected: Expected,
    behaviour: Behaviour | None = None,
    *,
    keep_alive: float | None = None,
) -> list[Check]:
    """Check the prompt that a server reads, its answer, and whether the answer stops.

    Args:
        behaviour: how the server serves the model, if known.
        keep_alive: seconds for which the model stays in the server's memory; None: the server's default.
    """
    options = {"temperature": 0, "repeat_penalty": 1.0, "num_predict": expected.tokens + SLACK}
    answer = client.chat(
        model=name,
        messages=expected.messages,
        options=options,
        keep_alive=keep_alive,
        logprobs=True,
        top_logprobs=TOLD,
    )
    return compare(answer, expected, behaviour)


def compare(answer: ChatResponse, expected: Expected, behaviour: Behaviour | None = None) -> list[Check]:
    """Compare a server's answer, in greedy decoding, with llama.cpp's."""
    answer_text, expected_text = _said(answer.message, expected.text)
    checks = [*_prompt(answer.prompt_eval_count, expected, behaviour), *_first_distribution(answer, expected)]
    if expected.tokens == 0:
        return [*checks, Check("first tokens", True, "not compared: llama.cpp itself hesitates at the first")]
    # llama.cpp drops white space before a complete answer, and engines drop a space that belongs to the first word
    same = (
        answer_text.strip() == expected_text.strip()
        if expected.ends
        else answer_text.lstrip(" ").startswith(expected_text.lstrip(" "))
    )
    found = f"{expected.tokens} as llama.cpp's: " if same else f"{_short(answer_text)} instead of "
    checks.append(Check("first tokens", same, found + _short(expected_text)))
    if not expected.ends:
        return [*checks, Check("stops by itself", True, "not compared: llama.cpp's own answer is longer")]
    stops = answer.done_reason == "stop"
    return [*checks, Check("stops by itself", stops, "it does" if stops else f"it does not ({answer.done_reason})")]


def _said(message: Message, wanted: str) -> tuple[str, str]:
    """Return the server's text and the expected one; a server that separates thinking drops its marks."""
    content = message.content or ""
    if not message.thinking:
        return content, wanted
    return (message.thinking + content).strip(), THINKING_MARKS.sub("", wanted)


def _prompt(read: int | None, expected: Expected, behaviour: Behaviour | None) -> list[Check]:
    """Compare the rendered prompt, if the server reports it, and the number of its tokens."""
    rendered, wanted = behaviour.prompt if behaviour else None, expected.prompt_tokens
    texts = [] if rendered is None else [_same_text("prompt", rendered, expected.prompt)]
    if read == expected.prompt_tokens:
        return [*texts, Check("prompt tokens", True, f"{read}, as in training")]
    if (
        behaviour
        and behaviour.leaves_out_cached
        and rendered == expected.prompt
        and (read or 0) < expected.prompt_tokens
    ):
        return [*texts, Check("prompt tokens", True, f"not compared: Ollama {behaviour.version} counts no cached ones")]
    why = "its TEMPLATE, its begin-of-text token or its tokenizer is another"
    found = f"the server reads {read} tokens where training would read {wanted}: {why}"
    return [*texts, Check("prompt tokens", False, found)]


def _first_distribution(answer: ChatResponse, expected: Expected) -> list[Check]:
    """Compare the distribution of the first token, if the server reports it."""
    if not answer.logprobs or not expected.first:
        return []
    reported = {entry.token: math.exp(entry.logprob) for entry in answer.logprobs[0].top_logprobs or []}
    distance = sum(abs(reported.get(text, 0.0) - likely) for text, likely in expected.first.items()) / 2
    found = f"total variation {distance:.3f} over {len(expected.first)} tokens (limit {FURTHEST})"
    return [Check("first distribution", distance <= FURTHEST, found)]


def _same_text(name: str, got: str, wanted: str) -> Check:
    if got == wanted:
        return Check(name, True, f"{len(wanted)} characters, as in training")
    at = first_difference(got, wanted)
    return Check(name, False, f"{_short(got[at : at + 60])} instead of {_short(wanted[at : at + 60])} at {at}")


def in_store(models: Path, model: OllamaModel, digest: str) -> list[Check]:
    """Check a model in the project's own store: its manifest, and the content of every blob."""
    place = ollama_store.manifest_path(models, model.name)
    try:
        manifest = place.read_bytes()
        described = json.loads(manifest)
        layers = ollama_store.layers_of(described)
        named = {described["config"]["digest"]: "configuration", **{layer.digest: layer.kind for layer in layers}}
    except FileNotFoundError:
        return [Check("manifest", False, f"{place} is not there")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [Check("manifest", False, f"{place} cannot be read ({type(error).__name__})")]
    checks = [_same("manifest", hashlib.sha256(manifest).hexdigest(), digest)]
    damage = {kind: why for blob, kind in named.items() if (why := _blob_damage(models, blob))}
    checks.append(Check("blobs", not damage, _named(damage) or f"{len(named)}, each with the content of its digest"))
    weights = [layer.digest.removeprefix("sha256:") for layer in layers if layer.kind == "model"]
    checks.append(_same("weights", weights, [model.sha256]))
    wanted = ollama_store.contents(model)
    for kind in ("template", "system", "params"):
        digests = [layer.digest.removeprefix("sha256:") for layer in layers if layer.kind == kind]
        checks.append(_same(kind, digests, [hashlib.sha256(data).hexdigest() for data in wanted.get(kind, [])]))
    return checks


def _blob_damage(models: Path, digest: str) -> str | None:
    try:
        found = digest_of_file(ollama_store.blob_path(models, digest))
    except OSError as error:
        return f"{digest[:19]} cannot be read ({error.strerror})"
    return None if digest == f"sha256:{found}" else f"{digest[:19]} has another content"


def _same(name: str, got: Any, wanted: Any) -> Check:
    if got == wanted:
        return Check(name, True, "as on record")
    return Check(name, False, f"{_short(got)} instead of {_short(wanted)}")


def _named(damage: Mapping[str, str]) -> str:
    return "; ".join(f"{kind}: {why}" for kind, why in damage.items())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _read_parameters(text: str) -> dict[str, list[Any]]:
    """Parse the parameters that a server shows: on each line a name, spaces, and a value in Go's notation."""
    values: dict[str, list[Any]] = {}
    for line in text.splitlines():
        key, value = line.split(None, 1)
        # Go's escapes in a quoted text are a subset of Python's
        values.setdefault(key, []).append(ast.literal_eval(value) if value.startswith('"') else _number(value))
    return values


def _number(value: Any) -> Any:
    """Return a value as a number if it is one, so that 1 and 1.0 compare equal."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value
