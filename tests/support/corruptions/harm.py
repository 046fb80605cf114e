"""A harm, the places where one can strike, and how a failure names what found it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from finetune_assets.export.ollama.modelfile import OllamaModel
from finetune_assets.reporting.errors import StepFailed

T = TypeVar("T", Callable[[Path], None], Callable[[OllamaModel], OllamaModel])

MERGED = "merged weights, before they are published"
GGUF = "GGUF file, before it is published"
PUBLISHED = "published artifact"
STORE = "our own Ollama store"
SERVER = "Ollama server"


@dataclass(frozen=True)
class Harm(Generic[T]):
    """One way of being wrong. `check` names the check that must find it; others may find it, too.

    `strike` changes a file or folder in its place, or says what is served instead of a model.
    """

    name: str
    check: str
    strike: T


def named(error: StepFailed) -> set[str]:
    """The checks that a failure of a step names; what cannot be read at all is named by its format."""
    found = set(re.findall(r"^  check ([a-z ]+): ", error.message, re.MULTILINE))
    return found or ({"safetensors"} if re.search(r"cannot read .*\.safetensors: ", error.message) else set())
