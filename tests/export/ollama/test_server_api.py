"""How a server is addressed, and how errors describe one that is absent, fails or is not an Ollama server."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from finetune_assets.export.ollama.expected_answer import Expected
from finetune_assets.export.ollama.modelfile import OllamaModel
from finetune_assets.export.ollama.server import api as ollama_server
from finetune_assets.export.ollama.server.api import answers, digest, parse_host
from finetune_assets.export.ollama.server.temporary import serving
from finetune_assets.reporting.errors import StepFailed
from tests.support.ollama.fixtures import put
from tests.support.servers.fixed_answers import stand_in

NOTHING = Expected("Hi", 1, "", 0, False)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("", "http://127.0.0.1:11434"),
        ("0.0.0.0:11434", "http://127.0.0.1:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        (":8000", "http://127.0.0.1:8000"),
        ("gpu.local", "http://gpu.local:11434"),
        ("gpu.local:99999", "http://gpu.local:11434"),
        ("http://gpu.local", "http://gpu.local:80"),
        ("https://gpu.local/ollama/", "https://gpu.local:443/ollama"),
        (" '10.0.0.2:1' ", "http://10.0.0.2:1"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("[::]", "http://[::1]:11434"),
        ("http://me:secret@gpu.local:1", "http://***@gpu.local:1"),
        ("me:secret@gpu.local", "http://***@gpu.local:11434"),
        ("https://gpu.local/ollama?key=secret#x", "https://gpu.local:443/ollama?***"),
    ],
)
def test_hosts_are_read_as_ollama_reads_them(text: str, host: str) -> None:
    assert parse_host(text) == host


def test_a_password_is_not_shown() -> None:
    with pytest.raises(StepFailed, match=r"not an address\nwrite .* without user name, password or key") as caught:
        answers(parse_host("https://me:secret@gpu.local/?key=secret"))
    assert "secret" not in str(caught.value)


def test_is_a_server_there() -> None:
    with stand_in({"/api/version": {"version": "1.2.3"}, "/api/tags": {"models": None}}) as host:
        assert answers(host) == "1.2.3"
        assert digest(host, "x") is None
    assert answers(host) is None
    for other in ({}, {"/api/version": b"<html>"}, {"/api/version": ["x"]}):
        with stand_in(other) as host, pytest.raises(StepFailed, match="not an Ollama server"):
            answers(host)


def test_an_answer_that_is_cut_short() -> None:
    """The server is lost, whichever way the library says it."""
    for nonsense in (b"<html>", b'{"models": ['):
        words = pytest.raises(OSError, match=r"its answer to /api/tags cannot be read \(JSONDecodeError\)")
        with stand_in({"/api/tags": nonsense}) as host, words:
            ollama_server.digests(host)


def test_a_server_that_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama_server, "BUSY", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(StepFailed, match=r"accepts connections, but did not answer within 1 seconds\nwait until"):
            answers(host, 0.5)


def test_what_speaks_another_language_is_no_server() -> None:
    def talk(server: socket.socket) -> None:
        for words in (b"SSH-2.0-OpenSSH_9.2\r\n", b""):
            connection, _ = server.accept()
            with connection:
                connection.sendall(words)
                connection.recv(1000)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=talk, args=[server])
        thread.start()
        host = f"http://127.0.0.1:{server.getsockname()[1]}"
        for _ in range(2):
            with pytest.raises(StepFailed, match="not an Ollama server: its answer to /api/version cannot be read"):
                answers(host)
        thread.join()
    with stand_in({"/api/version": {"version": "1"}}) as host, pytest.raises(StepFailed, match="no secure connection"):
        answers(host.replace("http", "https"))


def test_a_failing_server_is_explained(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    model = OllamaModel("demo:latest", tmp_path / "x.gguf", "0" * 64, "t", None, {})
    tags = {"/api/tags": {"models": None}}
    with (
        stand_in(tags) as host,
        pytest.raises(StepFailed, match=r"refused x.gguf: HTTP 404: Not Found\nwhat it served"),
    ):
        put(host, model, replies={"demo:latest": NOTHING})
    blob = {f"/api/blobs/sha256:{'0' * 64}": {}}
    with stand_in(tags | blob) as host, pytest.raises(StepFailed, match=r"refused demo: .*404"):
        put(host, model, replies={"demo:latest": NOTHING})
    with pytest.raises(StepFailed, match="was lost while making demo"):
        put(host, model, replies={"demo:latest": NOTHING})


def test_no_binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OLLAMA_BIN", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StepFailed, match="Ollama is not installed"), serving(tmp_path):
        pass
    broken = tmp_path / "ollama"
    broken.write_text("#!/bin/sh\necho port is taken; exit 3\n")
    broken.chmod(0o755)
    with pytest.raises(StepFailed, match=r"exit code 3: port is taken"), serving(tmp_path / "models"):
        pass
