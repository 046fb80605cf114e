"""The engine for models on an Ollama server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from finetune_assets.models.engines.engine import Messages
from finetune_assets.reporting.errors import StepFailed


class OllamaEngine:
    """A model on an Ollama server, with the template, system prompt and stop words that were created with it.

    Args:
        host: the server, e.g. http://127.0.0.1:11434
        name: the model's name there, with or without a tag.
        options: model options (temperature, num_ctx, ...); they override the defaults, which decode greedily.
        timeout: seconds without any data; a large model takes long to load.
    """

    def __init__(self, host: str, name: str, *, options: dict[str, Any] | None = None, timeout: float = 300):
        import ollama

        self.name = name
        self.speed: float | None = None
        self._host = host
        # A proxy from the environment is for remote servers; for a local one it would answer itself.
        self._client = ollama.Client(host=host, timeout=timeout, trust_env=not is_loopback(host))
        # Ollama penalises repetition by default, and the other engines do not.
        self._options = {"temperature": 0, "repeat_penalty": 1.0, **(options or {})}

    def stream(self, messages: Messages, *, max_new_tokens: int) -> Iterator[str]:
        """See `Engine.stream`."""
        import httpx
        import ollama

        options = {**self._options, "num_predict": max_new_tokens}
        try:
            for part in self._client.chat(model=self.name, messages=messages, stream=True, options=options):
                if part.message.content:
                    yield part.message.content
                if part.eval_count and part.eval_duration:
                    self.speed = part.eval_count / part.eval_duration * 1e9
        except ollama.ResponseError as error:
            hint = (
                "materialise ollama_model, or run `ollama list` for the names on the server"
                if error.status_code == 404
                else None
            )
            raise StepFailed(f"Ollama at {self._host}, model {self.name}: {error.error}", hint) from error
        except (ConnectionError, httpx.HTTPError) as error:
            raise StepFailed(
                f"Ollama at {self._host} does not answer: {error}",
                "start the server (`ollama serve`), or set OLLAMA_HOST to its address",
            ) from error

    def close(self) -> None:
        """See `Engine.close`. The server decides how long the model stays loaded."""


def is_loopback(url: str) -> bool:
    """Return whether the server is on this machine."""
    host = urlsplit(url if "://" in url else f"//{url}").hostname or ""
    return host in ("localhost", "::1", "0.0.0.0", "") or host.startswith("127.")
