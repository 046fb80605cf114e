"""The engine for GGUF files: llama.cpp, inside this process."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from queue import Queue
from typing import Any

from finetune_assets.machine.cores import cores
from finetune_assets.models.engines.engine import Messages, too_long
from finetune_assets.reporting.errors import StepFailed


class GgufEngine:
    """A GGUF file in llama.cpp, inside this process, rendered by the chat template that the file carries.

    llama.cpp's server object always opens a port on the loopback interface; a random key keeps others from using
    it.

    Args:
        num_ctx: context window in tokens; prompt and answer share it, and memory use grows with it.
        pure: return the model's text unchanged. Otherwise llama.cpp extracts tool calls from it, as it does for
            servers, and may change the messages for that.

    Raises:
        StepFailed: the file does not exist, or llama.cpp cannot load it.
    """

    def __init__(self, path: Path, *, num_ctx: int = 2048, pure: bool = True):
        if not path.is_file():
            raise StepFailed(f"GGUF file {path} does not exist", "materialise gguf_file, or check the path")
        self.name = path.stem
        self.speed: float | None = None
        xllamacpp: Any = import_module("xllamacpp")  # a compiled module without type stubs
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = num_ctx
        params.n_parallel = 1
        params.cpuparams.n_threads = cores()
        params.verbosity = -1  # nothing on stderr
        params.warmup = False
        params.hostnames = ["127.0.0.1"]
        params.port = 0
        self._key = secrets.token_urlsafe(32)
        params.api_keys = [self._key]
        params.ui = False
        params.endpoint_slots = False
        params.endpoint_metrics = True
        params.cache_ram_mib = 0  # the default keeps up to 8 GiB of earlier prompts
        params.force_pure_content_parser = pure
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError as error:
            raise StepFailed(
                f"llama.cpp cannot load {path}",
                "check that it is whole, fits into memory, and has an architecture that this llama.cpp supports",
            ) from error
        # Wait until its loop runs: a server that is deleted before its loop has started never returns.
        self._server.handle_metrics()

    def stream(self, messages: Messages, *, max_new_tokens: int) -> Iterator[str]:
        """See `Engine.stream`."""
        request = {
            "messages": messages,
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "stream": True,
            "reasoning_format": "none",
        }
        events: Queue[dict[str, Any] | Exception | None] = Queue()
        cancelled = threading.Event()

        def receive(event: dict[str, Any]) -> bool:
            events.put(event)
            return cancelled.is_set()  # True ends the generation

        def run(server: Any) -> None:
            try:
                server.handle_chat_completions(request, receive)
            except Exception as error:  # passed on to the thread that reads the answer
                events.put(error)
            events.put(None)

        # llama.cpp reports by callback, and this method is an iterator: llama.cpp gets a thread (it releases the GIL).
        worker = threading.Thread(target=run, args=[self._server], name="llama.cpp", daemon=True)
        worker.start()
        try:
            while (event := events.get()) is not None:
                yield from _piece(event)
                if isinstance(event, dict) and "timings" in event:
                    self.speed = event["timings"].get("predicted_per_second")
        finally:
            cancelled.set()
            worker.join()

    def complete(self, messages: Messages, *, max_new_tokens: int, stop: Sequence[str] = ()) -> dict[str, Any]:
        """Return the complete greedy answer as llama.cpp's chat completion object, token counts included."""
        request = {"messages": messages, "max_tokens": max_new_tokens, "temperature": 0, "stop": list(stop)}
        return self._server.handle_chat_completions({**request, "reasoning_format": "none"})

    def close(self) -> None:
        """See `Engine.close`."""
        self._server = None


def _piece(event: dict[str, Any] | Exception) -> Iterator[str]:
    """Yield the text of one llama.cpp stream event, if there is any."""
    if isinstance(event, Exception):
        raise StepFailed(f"llama.cpp did not answer: {event}") from event
    if error := event.get("error"):
        if error.get("type") == "exceed_context_size_error":
            raise too_long(error["n_prompt_tokens"], error["n_ctx"], ", or raise ollama.num_ctx in the recipe")
        raise StepFailed(f"llama.cpp did not answer: {error.get('message', error)}")
    for choice in event.get("choices", []):
        if text := choice["delta"].get("content"):
            yield text
