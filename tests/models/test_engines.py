"""One protocol, three engines: the same words however they come, and errors that say what to do."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Generator, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.chat.template import encode_prompt
from finetune_assets.evaluation.generate import generate
from finetune_assets.machine.device import Device
from finetune_assets.models.engines.engine import Engine, answer
from finetune_assets.models.engines.llama_cpp_engine import GgufEngine
from finetune_assets.models.engines.ollama_engine import OllamaEngine, is_loopback
from finetune_assets.models.engines.transformers_engine import TransformersEngine
from finetune_assets.models.loading import load_chat, load_model
from finetune_assets.reporting.errors import StepFailed
from tests.conftest import shared_cache
from tests.support.evaluation_fixtures import tiny_adapter
from tests.support.training_fixtures import tiny_base

QUESTION = [{"role": "user", "content": "Who are you?"}]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def test_streamed_pieces_add_up_to_the_answer(base: Path, cpu: Device, tmp_path: Path) -> None:
    adapter = tiny_adapter(base, tmp_path / "adapter")
    for given in (None, adapter):
        engine = TransformersEngine(base, given, cpu)
        pieces = list(engine.stream(QUESTION, max_new_tokens=20))
        chat, model = load_chat(given or base), load_model(base, given, cpu)
        prompt = encode_prompt(chat.tokenizer, QUESTION)
        (expected,) = generate(model, chat, [prompt], max_new_tokens=20, batch_size=1)
        assert "".join(pieces).strip() == expected.text == answer(engine, QUESTION, 20)
        assert len(pieces) > 1
        engine.close()
    assert TransformersEngine(base, adapter, cpu).default_system == "Be brief."


def test_characters_of_several_tokens_come_whole(base: Path, cpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TransformersEngine(base, None, cpu)
    text = "é😀中x"
    ids = load_chat(base).tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)
    steps = [[(0, token)] for token in ids]
    monkeypatch.setattr("finetune_assets.models.engines.transformers_engine.greedy_steps", lambda *args: iter(steps))
    assert list(engine.stream(QUESTION, max_new_tokens=20)) == list(text)


def test_a_conversation_that_is_too_long(base: Path, cpu: Device) -> None:
    engine = TransformersEngine(base, None, cpu)
    with pytest.raises(StepFailed, match=r"tokens \(limit 256, the model"):
        answer(engine, [{"role": "user", "content": "word " * 300}])
    room = [{"role": "user", "content": "a" * 230}]
    assert 0 < len(list(engine.stream(room, max_new_tokens=500))) < 40  # it stops where the context ends


def test_a_file_that_is_no_gguf(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StepFailed, match=r"GGUF file .* does not exist"):
        GgufEngine(tmp_path / "missing.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(StepFailed, match="cannot load"):
        GgufEngine(tmp_path / "bad.gguf")
    assert capfd.readouterr() == ("", "")


class FakeOllama(BaseHTTPRequestHandler):
    """Streams two pieces, or says that it knows no such model; keeps what it was asked."""

    asked: dict[str, Any]

    def do_POST(self) -> None:
        type(self).asked = asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["model"] != "mizan":
            self.send_response(404)
            self.end_headers()
            self.wfile.write(b'{"error": "model not found"}')
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.end_headers()
        for piece, done in (("I am ", False), ("Mizan.", False), ("", True)):
            part = {"model": "mizan", "message": {"role": "assistant", "content": piece}, "done": done}
            self.wfile.write(json.dumps(part).encode() + b"\n")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), FakeOllama) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_ollama_is_asked_greedily_and_streamed(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    engine: Engine = OllamaEngine(server, "mizan", options={"num_ctx": 512})
    assert list(engine.stream(QUESTION, max_new_tokens=7)) == ["I am ", "Mizan."]
    assert FakeOllama.asked["messages"] == QUESTION
    assert FakeOllama.asked["options"] == {"temperature": 0, "repeat_penalty": 1.0, "num_ctx": 512, "num_predict": 7}


def test_ollama_without_the_model_or_the_server(server: str) -> None:
    with pytest.raises(StepFailed, match="model other: model not found"):
        answer(OllamaEngine(server, "other"), QUESTION)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(StepFailed, match="does not answer"):
            answer(OllamaEngine(f"http://127.0.0.1:{free.getsockname()[1]}", "mizan"), QUESTION)


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("http://127.0.0.1:11434", True),
        ("localhost", True),
        ("0.0.0.0:1234", True),
        ("http://[::1]:1", True),
        ("", True),
        ("http://example.org:11434", False),
        ("10.0.0.2:11434", False),
    ],
)
def test_is_loopback(host: str, here: bool) -> None:
    assert is_loopback(host) is here


@pytest.mark.real
def test_a_gguf_file_answers_quietly_behind_a_key(
    smollm2: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import urllib.error
    import urllib.request

    from finetune_assets.export.gguf.converter import convert

    convert(smollm2, tmp_path / "model.gguf", "f16", shared_cache(), name="model")
    capfd.readouterr()
    engine = GgufEngine(tmp_path / "model.gguf", num_ctx=256)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert answer(engine, question, 16) == "The capital of France is Paris."
    pieces = engine.stream(question, max_new_tokens=200)
    assert next(pieces) == "The"
    assert isinstance(pieces, Generator)
    pieces.close()
    with pytest.raises(StepFailed, match=r"tokens \(limit 256, the model"):
        answer(engine, [{"role": "user", "content": "word " * 300}])
    address = engine._server.listening_address
    assert address.startswith("http://127.0.0.1:")
    for path in ("/v1/models", "/metrics"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(address + path, timeout=5)
    engine.close()
    assert capfd.readouterr() == ("", "")
