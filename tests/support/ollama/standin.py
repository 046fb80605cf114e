"""A stand-in for an Ollama server of August 2026 (0.31.2 to 0.34), whose binary cannot be had here.

It is not Ollama. It does what was read in Ollama's source and documentation, and no more: `create` copies weights with
llama-quantize (with our own writer of the same form where the tool was not built), the choice between TEMPLATE and the
GGUF file's chat template, prompts and answers by llama.cpp's server (the one in xllamacpp), `_debug_render_only`,
`logprobs`, and the folder's layout. TEMPLATE is rendered by the project's own evaluator of Go templates, whose results
are compared with a real Ollama 0.9.3 elsewhere. The texts of errors are its own.

usage: python -m tests.support.ollama.standin serve   (OLLAMA_HOST, OLLAMA_MODELS, OLLAMA_GO_TEMPLATE as for Ollama)
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from finetune_assets.export.ollama.template.derive import go_data
from finetune_assets.export.ollama.template.go_eval import render
from finetune_assets.models.engines.llama_cpp_probe import ProbeEngine
from finetune_assets.models.formats.gguf import read_head
from tests.support.ollama.standin_store import Refused, Store, Stored, copy_weights, details, shown

VERSION = "0.34.1-standin"
STAMP = "2026-08-21T00:00:00Z"
RESULTS = ("tool_response", "tool_results", "message.role == 'tool'", 'message.role == "tool"', "ipython")
ROLE = re.compile(r"""role['"]\] == ['"]tool['"]""")


@dataclass
class Settings:
    """How the server behaves; tests change it.

    Attributes:
        copy: what `create` makes of a GGUF file.
        go_template: OLLAMA_GO_TEMPLATE.
        tells: knows `_debug_render_only` and logprobs.
        counts_cached: counts the prompt tokens that it had read before, too; the first 0.30 releases did not.
    """

    version: str = VERSION
    copy: Callable[[Path, Path], None] = copy_weights
    go_template: str | None = None
    tells: bool = True
    counts_cached: bool = True


class LlamaServer(ProbeEngine):
    """A GGUF file in llama.cpp's server."""

    def __init__(self, path: Path, num_ctx: int):
        super().__init__(path, num_ctx=num_ctx, letter=0)
        self.key = (path, num_ctx)

    def answer(self, prompt: str, options: dict[str, Any], top: int | None) -> dict[str, Any]:
        known = ("temperature", "repeat_penalty", "top_k", "top_p", "stop", "seed")
        request: dict[str, Any] = {key: options[key] for key in known if key in options}
        request |= {"prompt": prompt, "max_tokens": options.get("num_predict", -1), "cache_prompt": True}
        if top is not None:
            request |= {"logprobs": max(1, top), "n_probs": max(1, top)}
        return self._server.handle_completions(request)


def prefers_jinja(template: str, jinja: str) -> bool:
    """Whether the chat template is preferred to TEMPLATE, by what the texts of both can do."""
    ours = {
        name
        for name, part in (("tools", ".Tools"), ("insert", ".Suffix"), ("thinking", ".Thinking"))
        if part in template
    }
    theirs = {"tools"} if "tools" in jinja or "tool_call" in jinja else set[str]()
    splits = "content.split('</think>')" in jinja and "reasoning_content" not in jinja and "<SPECIAL_12>" not in jinja
    theirs |= {"thinking"} if splits or ("<think>" in jinja and "</think>" in jinja) else set[str]()
    returns = any(part in template for part in ('eq .Role "tool"', "tool_response", "TOOL_RESULTS"))
    trip = ".Tools" in template and ".ToolCalls" in template and returns
    results = any(part in jinja for part in RESULTS) or ROLE.search(jinja) is not None
    jinja_trip = "tools" in theirs and ("tool_calls" in jinja or "assistant_tool_call" in jinja) and results
    if len(theirs) > len(ours):
        return not trip or jinja_trip
    return theirs == ours and "tools" in ours and jinja_trip and not trip


class Server:
    """Answers requests, one at a time."""

    def __init__(self, models: Path, settings: Settings):
        self.settings = settings
        self.store = Store(models, lambda source, target: settings.copy(source, target))
        self.engine: LlamaServer | None = None

    def loaded(self, model: Stored, options: dict[str, Any]) -> LlamaServer:
        key = (model.weights, int(options.get("num_ctx", 4096)))
        if self.engine is None or self.engine.key != key:
            self.unload()
            self.engine = LlamaServer(*key)
        return self.engine

    def unload(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine = None

    def prompt(self, model: Stored, engine: LlamaServer, messages: list[dict[str, Any]]) -> str:
        """A conversation's prompt, by TEMPLATE or by the chat template."""
        if model.system and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": model.system}, *messages]
        jinja, template = read_head(model.weights).get("tokenizer.chat_template"), model.template
        if template is not None and jinja is not None and self.settings.go_template is None:
            by_jinja = prefers_jinja(template, jinja)
        else:
            by_jinja = template is None or (jinja is not None and self.settings.go_template == "0")
        return engine.prompt({"messages": messages}) if by_jinja else render(str(template), go_data(messages))

    def answer(self, request: dict[str, Any], *, chat: bool) -> Iterator[dict[str, Any]]:
        """The parts of an answer to /api/chat or /api/generate."""
        model = self.store.read(request["model"])
        options = {"temperature": 0.8, **model.parameters, **(request.get("options") or {})}
        engine = self.loaded(model, options)
        if chat:
            prompt = self.prompt(model, engine, request["messages"])
        elif request.get("raw"):
            prompt = request["prompt"]
        else:
            prompt = self.prompt(model, engine, [{"role": "user", "content": request["prompt"]}])
        common = {"model": request["model"], "created_at": STAMP}
        if request.get("_debug_render_only") and self.settings.tells:
            yield common | {"done": False, "_debug_info": {"rendered_template": prompt}}
            return
        top = request.get("top_logprobs", 0) if request.get("logprobs") and self.settings.tells else None
        found = engine.answer(prompt, options, top)
        if "choices" not in found:
            raise Refused(str(found.get("error", {}).get("message", found)), 500)
        (choice,) = found["choices"]
        timings = found["timings"]
        words: dict[str, Any] = (
            {"message": {"role": "assistant", "content": choice["text"]}} if chat else {"response": choice["text"]}
        )
        if top is not None:
            words["logprobs"] = [_told(entry, top) for entry in choice["logprobs"]["content"]]
        read = found["usage"]["prompt_tokens"] if self.settings.counts_cached else timings["prompt_n"]
        end = {"done_reason": choice["finish_reason"], "prompt_eval_count": read, "total_duration": 1}
        end |= {"eval_count": found["usage"]["completion_tokens"], "eval_duration": int(timings["predicted_ms"] * 1e6)}
        if request.get("keep_alive") == 0:
            self.unload()
        if request.get("stream", True):
            yield common | words | {"done": False}
            words = {"message": {"role": "assistant", "content": ""}} if chat else {"response": ""}
        yield common | words | {"done": True} | end

    def create(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self.unload()
        self.store.create(request)
        if request.get("stream", True):
            yield from ({"status": status} for status in ("parsing GGUF", "writing manifest"))
        yield {"status": "success"}

    def tags(self) -> dict[str, Any]:
        models = [self.store.read(name) for name in self.store.names()]
        about = {"modified_at": STAMP}
        return {
            "models": [
                {"name": model.name, "model": model.name, "size": model.size, "digest": model.digest, **about}
                | {"details": details(model)}
                for model in models
            ]
        }


def _told(entry: dict[str, Any], top: int) -> dict[str, Any]:
    one = {key: entry[key] for key in ("token", "logprob", "bytes") if key in entry}
    others = [{key: other[key] for key in one} for other in entry["top_logprobs"][:top]]
    return one | {"top_logprobs": [other for other in others if other["logprob"] is not None]}


def handler(server: Server) -> type[BaseHTTPRequestHandler]:
    turn = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def handle_request(self) -> None:
            with turn:
                try:
                    self.route()
                except Refused as error:
                    self.reply({"error": str(error)}, error.status)

        do_GET = do_POST = do_HEAD = do_DELETE = handle_request

        def route(self) -> None:
            path, store = self.path.rstrip("/"), server.store
            if path.startswith("/api/blobs/"):
                return self.blob(path.rpartition("/")[2])
            request: dict[str, Any] = json.loads(self.body().read() or b"{}")
            name = request.get("model") or request.get("name") or ""
            if path == "":
                self.reply("Ollama is running")
            elif path == "/api/version":
                self.reply({"version": server.settings.version})
            elif path == "/api/tags":
                self.reply(server.tags())
            elif path == "/api/ps":
                self.reply({"models": []})
            elif path == "/api/show":
                self.reply(shown(store, store.read(name), verbose=bool(request.get("verbose"))))
            elif path == "/api/copy":
                self.reply(store.duplicate(request["source"], request["destination"]))
            elif path == "/api/delete":
                self.reply(store.delete(name))
            elif path == "/api/create":
                self.stream(server.create(request))
            elif path in ("/api/chat", "/api/generate"):
                self.stream(server.answer(request, chat=path == "/api/chat"))
            else:
                raise Refused("404 page not found", 404)

        def blob(self, digest: str) -> None:
            if self.command == "HEAD":
                return self.reply(None, 200 if server.store.blob(digest).is_file() else 404)
            server.store.take(digest, self.body())
            self.reply(None, 201)

        def body(self) -> Any:
            """What is sent with the request, as a file."""
            if self.headers.get("Transfer-Encoding") != "chunked":
                return _Limited(self.rfile, int(self.headers.get("Content-Length") or 0))
            parts = bytearray()
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return io.BytesIO(parts)

        def reply(self, content: Any, status: int = 200) -> None:
            data = b"" if content is None else (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def stream(self, parts: Iterator[dict[str, Any]]) -> None:
            """Each part on a line; the first one decides whether the request is refused."""
            first = next(parts)
            self.send_response(200)
            self.send_header("Content-Type", "application/x-ndjson")
            self.end_headers()
            for part in (first, *parts):
                self.wfile.write(json.dumps(part, ensure_ascii=True).encode() + b"\n")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


class _Limited:
    """The first bytes of a connection as a file."""

    def __init__(self, source: Any, left: int):
        self.source, self.left = source, left

    def read(self, size: int = -1) -> bytes:
        data = self.source.read(self.left if size < 0 else min(size, self.left))
        self.left -= len(data)
        return data


@contextmanager
def standing_in(
    models: Path, settings: Settings | None = None, address: tuple[str, int] = ("127.0.0.1", 0)
) -> Iterator[str]:
    """Run the stand-in over a model store; yields its address."""
    server = Server(models, settings or Settings())
    web = ThreadingHTTPServer(address, handler(server))
    thread = threading.Thread(target=web.serve_forever, name="ollama stand-in")
    thread.start()
    try:
        yield f"http://{address[0]}:{web.server_address[1]}"
    finally:
        web.shutdown()
        thread.join()
        web.server_close()
        server.unload()


def main() -> None:
    if sys.argv[1:] != ["serve"]:
        sys.exit(__doc__)
    host, _, port = os.environ.get("OLLAMA_HOST", "127.0.0.1:11434").rpartition(":")
    folder = Path(os.environ.get("OLLAMA_MODELS") or "~/.ollama/models").expanduser()
    settings = Settings(go_template=os.environ.get("OLLAMA_GO_TEMPLATE"))
    with standing_in(folder, settings, (host, int(port))):
        threading.Event().wait()


if __name__ == "__main__":
    main()
