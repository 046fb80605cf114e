"""The protocol for chat with a model at each stage: base, adapter or merged folder, GGUF file, Ollama.

All engines decode greedily, so a difference between two answers comes from the model. Messages are
{"role", "content"} dictionaries and end with a user turn; the caller adds the system prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from finetune_assets.reporting.errors import StepFailed

Messages = list[dict[str, str]]


class Engine(Protocol):
    """A model that answers conversations.

    `speed` belongs to the last complete answer: generated tokens per second, without the time to read the prompt.
    """

    name: str
    speed: float | None

    def stream(self, messages: Messages, *, max_new_tokens: int) -> Iterator[str]:
        """Yield the answer piece by piece. Leaving the iteration early ends the generation.

        Raises:
            StepFailed: the conversation does not fit into the context, or the server did not answer.
        """
        ...

    def close(self) -> None:
        """Free the model's memory; the engine cannot be used afterwards."""
        ...


def answer(engine: Engine, messages: Messages, max_new_tokens: int = 128) -> str:
    """Return the complete answer, without surrounding white space."""
    return "".join(engine.stream(messages, max_new_tokens=max_new_tokens)).strip()


def too_long(tokens: int, room: int, remedy: str = "") -> StepFailed:
    """Return the error for a conversation that does not fit into the model's context."""
    return StepFailed(
        f"the conversation has {tokens} tokens (limit {room}, the model's context)",
        f"start a new conversation{remedy}",
    )
