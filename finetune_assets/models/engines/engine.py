"""Talking to a model at each stage of its making: base, adapter or merged folder, GGUF file, Ollama.

All engines answer greedily, so that what differs between two of them is the model. Messages are
{"role", "content"} dictionaries and end with a user turn; a system prompt is added by the caller.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from finetune_assets.chat.template import encode_prompt
from finetune_assets.chat.template_limits import prove_folder
from finetune_assets.machine.cores import cores
from finetune_assets.models.decoding import context_length, greedy_steps, load_chat, load_model
from finetune_assets.reporting.errors import StepFailed

if TYPE_CHECKING:
    from finetune_assets.machine.device import Device

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


class TransformersEngine:
    """A Hugging Face folder (base or merged model), with an adapter on it if one is given.

    Args:
        template: the chat template of a base model that has none of its own.
    """

    def __init__(
        self,
        folder: Path,
        adapter: Path | None,
        device: Device,
        *,
        template: str = "auto",
        trust_remote_code: bool = False,
    ):
        self.name = f"{folder.name} + {adapter.name}" if adapter else folder.name
        self.speed: float | None = None
        prove_folder(adapter or folder, None)
        self._chat = load_chat(adapter or folder, template=template, trust_remote_code=trust_remote_code)
        self._model: Any = load_model(folder, adapter, device, trust_remote_code=trust_remote_code)

    @property
    def default_system(self) -> str | None:
        """The system prompt that the model was trained with, for callers who have no other."""
        return self._chat.default_system

    def stream(self, messages: Messages, *, max_new_tokens: int) -> Iterator[str]:
        """See `Engine.stream`."""
        prompt = encode_prompt(self._chat.tokenizer, messages)
        room = context_length(self._model)
        if room is not None and len(prompt) >= room:
            raise _too_long(len(prompt), room)
        most = max_new_tokens if room is None else min(max_new_tokens, room - len(prompt))
        said: list[int] = []
        shown = ""
        began = None
        for [(_, token)] in greedy_steps(self._model, [prompt], self._chat.stop_token_ids, most):
            now = time.monotonic()
            began = began or now  # the first token came with the reading of the prompt
            self.speed = len(said) / (now - began) if now > began else None
            if token in self._chat.stop_token_ids:
                break
            said.append(token)
            text = self._text(said)
            # Bytes of an unfinished character decode to this mark: they wait for the rest of it.
            if text.endswith("\ufffd"):
                continue
            yield text[len(shown) :]
            shown = text
        if rest := self._text(said)[len(shown) :]:
            yield rest

    def _text(self, ids: list[int]) -> str:
        return str(self._chat.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def close(self) -> None:
        """See `Engine.close`."""
        self._model = None


class GgufEngine:
    """A GGUF file in llama.cpp, inside this process, rendered by the chat template that the file carries.

    llama.cpp's server object opens a port on the loopback interface, which it cannot be talked out of; a random key
    keeps everyone else from using it.

    Args:
        num_ctx: context window in tokens; prompt and answer share it, and memory grows with it.
        pure: take the model's words as they are; otherwise llama.cpp picks tool calls out of them, as it does for
            servers, and may prepare messages for that.

    Raises:
        StepFailed: no such file, or llama.cpp cannot load it.
    """

    def __init__(self, path: Path, *, num_ctx: int = 2048, pure: bool = True):
        if not path.is_file():
            raise StepFailed(f"{path}: there is no such GGUF file", "materialise gguf_file, or check the path")
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
        params.cache_ram_mib = 0  # else up to 8 GiB of earlier prompts
        params.force_pure_content_parser = pure
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError as error:
            raise StepFailed(
                f"{path}: llama.cpp cannot load this file",
                "it may be damaged, too large for the memory, or of an architecture that this llama.cpp does not know",
            ) from error
        # An answer from its loop: a server that is let go before that has begun waits for it for ever.
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
        left = threading.Event()

        def receive(event: dict[str, Any]) -> bool:
            events.put(event)
            return left.is_set()  # True ends the generation

        def run(server: Any) -> None:
            try:
                server.handle_chat_completions(request, receive)
            except Exception as error:  # whatever it is, it belongs to the thread that reads the answer
                events.put(error)
            events.put(None)

        # llama.cpp calls back, we hand out an iterator: it needs a thread of its own (it releases the GIL).
        worker = threading.Thread(target=run, args=[self._server], name="llama.cpp", daemon=True)
        worker.start()
        try:
            while (event := events.get()) is not None:
                yield from _piece(event)
                if isinstance(event, dict) and "timings" in event:
                    self.speed = event["timings"].get("predicted_per_second")
        finally:
            left.set()
            worker.join()

    def complete(self, messages: Messages, *, max_new_tokens: int, stop: Sequence[str] = ()) -> dict[str, Any]:
        """The whole greedy answer as llama.cpp's chat completion object, token counts included."""
        request = {"messages": messages, "max_tokens": max_new_tokens, "temperature": 0, "stop": list(stop)}
        return self._server.handle_chat_completions({**request, "reasoning_format": "none"})

    def close(self) -> None:
        """See `Engine.close`."""
        self._server = None


def _piece(event: dict[str, Any] | Exception) -> Iterator[str]:
    """The text in one of llama.cpp's stream events, if there is any."""
    if isinstance(event, Exception):
        raise StepFailed(f"llama.cpp gave no answer: {event}") from event
    if error := event.get("error"):
        if error.get("type") == "exceed_context_size_error":
            raise _too_long(error["n_prompt_tokens"], error["n_ctx"], ", or raise ollama.num_ctx in the recipe")
        raise StepFailed(f"llama.cpp gave no answer: {error.get('message', error)}")
    for choice in event.get("choices", []):
        if text := choice["delta"].get("content"):
            yield text


class OllamaEngine:
    """A model on an Ollama server, with the template, system prompt and stop words that were created with it.

    Args:
        host: the server, e.g. http://127.0.0.1:11434
        name: the model's name there, with or without a tag.
        options: of the model (temperature, num_ctx, ...); they go before those given here, which make it greedy.
        timeout: seconds without a sign of life; loading a large model takes its time.
    """

    def __init__(self, host: str, name: str, *, options: dict[str, Any] | None = None, timeout: float = 300):
        import ollama

        self.name = name
        self.speed: float | None = None
        self._host = host
        # A proxy from the environment is for the world outside, and would answer for a local server.
        self._client = ollama.Client(host=host, timeout=timeout, trust_env=not is_loopback(host))
        # Ollama's own default penalises repetition, which is another decoding than the other engines'.
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
                "materialise ollama_model, or see `ollama list` for the names there"
                if error.status_code == 404
                else None
            )
            raise StepFailed(f"Ollama at {self._host}, model {self.name}: {error.error}", hint) from error
        except (ConnectionError, httpx.HTTPError) as error:
            raise StepFailed(
                f"Ollama at {self._host} does not answer: {error}",
                "start the server (`ollama serve`), or set OLLAMA_HOST to where it runs",
            ) from error

    def close(self) -> None:
        """See `Engine.close`. The model stays loaded on the server for as long as the server keeps it."""


def is_loopback(url: str) -> bool:
    """Whether the server is on this very machine."""
    host = urlsplit(url if "://" in url else f"//{url}").hostname or ""
    return host in ("localhost", "::1", "0.0.0.0", "") or host.startswith("127.")


def _too_long(tokens: int, room: int, remedy: str = "") -> StepFailed:
    return StepFailed(
        f"the conversation is {tokens} tokens long, and the model's context holds {room}",
        f"start a new conversation{remedy}",
    )
