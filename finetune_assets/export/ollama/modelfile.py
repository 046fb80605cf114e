"""What an Ollama model is made of, and the Modelfile that says so to people and to `ollama create`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_assets.recipe import OllamaSection

BATCH = 512  # Ollama's default number of prompt tokens read at once


@dataclass(frozen=True)
class OllamaModel:
    """What is served under one name.

    Args:
        name: with its tag, as in demo:latest.
        gguf: the weights' file.
        sha256: of that file (hex), as on record.
        parameters: as `parameters` gives them.
    """

    name: str
    gguf: Path
    sha256: str
    template: str
    system: str | None
    parameters: Mapping[str, Any]
    licenses: Sequence[str] = ()

    @property
    def base(self) -> str:
        """The name without its tag."""
        return self.name.partition(":")[0]


def parameters(section: OllamaSection, chat_stop: Sequence[str]) -> dict[str, Any]:
    """Return the PARAMETERs of a served model: stop texts of chat template and recipe, and the recipe's options."""
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


def modelfile(model: OllamaModel) -> str:
    """Return a Modelfile that `ollama create -f` reads. A text that it cannot hold is replaced by a comment."""
    texts = [("TEMPLATE", model.template), *([("SYSTEM", model.system)] if model.system else [])]
    lines = [f"FROM {model.gguf}", *(_instruction(key, text) for key, text in texts)]
    for key, value in sorted(model.parameters.items()):
        lines += [_instruction(f"PARAMETER {key}", one) for one in (value if isinstance(value, list) else [value])]
    lines += [_instruction("LICENSE", text) for text in model.licenses]
    return "\n".join(lines) + "\n"


def _instruction(key: str, value: Any) -> str:
    if not isinstance(value, str):
        return f"{key} {value}"
    if (what := _beyond_modelfiles(value)) is not None:
        return f"# {key} is left out: a Modelfile cannot hold {what}; the served model has it"
    return f'{key} """{value}"""'


def _beyond_modelfiles(text: str) -> str | None:
    """Return what in a text Ollama's parser of Modelfiles would change; it knows no escapes."""
    # it ends a quoted value at the first line that ends in its quotes, trailing white space aside
    if any(line.rstrip().endswith('"""') for line in text.replace("\r", "\n").split("\n")[:-1]):
        return 'a line that ends in """'
    lost = next((character for character in text if not character.isprintable() and character not in "\t\n\r"), None)
    return None if lost is None else f"the character U+{ord(lost):04X}"
