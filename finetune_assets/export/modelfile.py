"""What an Ollama model is made of besides its weights: parameters, and a Modelfile for people to read and reuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune_assets.errors import BadInput
from finetune_assets.recipe import OllamaSection

BATCH = 512  # Ollama's default number of prompt tokens read at once


def parameters(section: OllamaSection, chat_stop: Sequence[str]) -> dict[str, Any]:
    """The PARAMETERs of a served model: stop texts of its chat template and of the recipe, and the recipe's options."""
    options = {
        # A batch (512 by default) larger than the context ends Ollama 0.9's runner with an assertion.
        "num_batch": section.num_ctx if section.num_ctx < BATCH else None,
        "num_ctx": section.num_ctx,
        "repeat_penalty": section.repeat_penalty,
        "temperature": section.temperature,
        "top_k": section.top_k,
        "top_p": section.top_p,
    }
    stop = list(dict.fromkeys([*chat_stop, *section.stop]))
    return ({"stop": stop} if stop else {}) | {key: value for key, value in options.items() if value is not None}


def modelfile(
    source: str, *, template: str, system: str | None, parameters: Mapping[str, Any], licenses: Sequence[str] = ()
) -> str:
    """A Modelfile that `ollama create -f` reads; `source` is what stands behind FROM.

    Raises:
        BadInput: a text cannot be written in a Modelfile (it has no escape for a line that ends in three quotes).
    """
    lines = [f"FROM {source}", f"TEMPLATE {_quoted('TEMPLATE', template)}"]
    if system:
        lines.append(f"SYSTEM {_quoted('SYSTEM', system)}")
    for key, value in sorted(parameters.items()):
        for one in value if isinstance(value, list) else [value]:
            lines.append(f"PARAMETER {key} {_quoted(key, one) if isinstance(one, str) else one}")
    lines += [f"LICENSE {_quoted('LICENSE', text)}" for text in licenses]
    return "\n".join(lines) + "\n"


def _quoted(what: str, text: str) -> str:
    # Ollama ends a quoted value at the first line that ends in its quotes, trailing white space aside.
    if any(line.rstrip().endswith('"""') for line in text.split("\n")[:-1]):
        raise BadInput(
            f'{what} has a line that ends in """, which a Modelfile cannot hold',
            "write it with other quotes",
        )
    return f'"""{text}"""'
