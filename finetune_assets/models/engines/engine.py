"""Talking to a model at each stage of its making: base, adapter or merged folder, GGUF file, Ollama.

All engines answer greedily, so that what differs between two of them is the model. Messages are
{"role", "content"} dictionaries and end with a user turn; a system prompt is added by the caller.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from finetune_assets.reporting.errors import StepFailed

Messages = list[dict[str, str]]


class Engine(Protocol):
    """Something that answers. `stream` yields the answer in pieces as they come; `close` frees the model's memory.

    `speed` is that of the last whole answer: tokens per second of writing, without the reading of the prompt.
    """

    name: str
    speed: float | None

    def stream(self, messages: Messages, *, max_new_tokens: int) -> Iterator[str]:
        """The answer, piece by piece. Leaving the iteration early ends the generation.

        Raises:
            StepFailed: the conversation does not fit into the context, or the server gave no answer.
        """
        ...

    def close(self) -> None:
        """The engine is not used any more."""
        ...


def answer(engine: Engine, messages: Messages, max_new_tokens: int = 128) -> str:
    """The whole answer at once, without surrounding white space."""
    return "".join(engine.stream(messages, max_new_tokens=max_new_tokens)).strip()


def too_long(tokens: int, room: int, remedy: str = "") -> StepFailed:
    """Return the error for a conversation that does not fit into the model's context."""
    return StepFailed(
        f"the conversation is {tokens} tokens long, and the model's context holds {room}",
        f"start a new conversation{remedy}",
    )
