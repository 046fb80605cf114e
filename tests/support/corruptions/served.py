"""Harms of models that a server serves."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune_assets.export.ollama.modelfile import OllamaModel
from tests.support.corruptions.harm import Harm

NASTY = 'You are """Ada""" {{ .System }} {{{ "x" }}}\n"""\nBe {% brief %}. 你好 """'


def _stops(model: OllamaModel) -> OllamaModel:
    return replace(model, parameters={**model.parameters, "stop": ["<|endoftext|>"]})


def _half_a_system(model: OllamaModel) -> OllamaModel:
    """What is left of the system prompt by someone who ends it at its first three quotes."""
    return replace(model, system=(model.system or "").partition('"""')[0])


def _rendered_system(model: OllamaModel) -> OllamaModel:
    """... or by someone who takes its braces for a template's."""
    return replace(model, system=re.sub(r"{{.*?}}", "", model.system or ""))


def served_harms(other: Path) -> tuple[Harm[Callable[[OllamaModel], OllamaModel]], ...]:
    """Models that someone puts in the place of one whose system prompt is `NASTY`.

    Args:
        other: another GGUF file with the same tokenizer.
    """
    from finetune_assets.store.digests import digest_of_file

    digest = digest_of_file(other)
    return (
        Harm("other weights", "weights", lambda model: replace(model, gguf=other, sha256=digest)),
        Harm("a newline more in the template", "template", lambda model: replace(
            model, template=model.template + "\n")),
        Harm("wrong stop text", "stops", _stops),
        Harm("no stop text", "stops", lambda model: replace(
            model, parameters={key: value for key, value in model.parameters.items() if key != "stop"})),
        Harm("a system prompt cut at its triple quotes", "system", _half_a_system),
        Harm("a system prompt whose braces are gone", "system", _rendered_system),
        Harm("another temperature", "parameters", lambda model: replace(
            model, parameters={**model.parameters, "temperature": 1.5})),
    )  # fmt: skip


Create = Callable[[Any, str, OllamaModel], None]


def put_there(host: str, name: str, model: OllamaModel, create: Create) -> None:
    """Make a model on a server under a name, whatever is there.

    Args:
        create: ollama_create's own.
    """
    from ollama import Client

    from finetune_assets.export.ollama.server import upload as ollama_upload

    ollama_upload.send(host, model.gguf, model.sha256, lambda event: None)
    create(Client(host=host, timeout=300, trust_env=False), name, model)


def slip(host: str, harm: Harm[Callable[[OllamaModel], OllamaModel]], create: Create) -> Create:
    """What creates another model than it was asked for."""
    return lambda client, name, model: put_there(host, name, harm.strike(model), create)
