"""An Ollama server in trouble: what it served goes on, nothing is left half done, and a retry succeeds.

The server is a real one; a proxy before it, a signal or a small disk makes the trouble.
"""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.export.ollama.expected_answer import Expected, expected
from finetune_assets.export.ollama.modelfile import OllamaModel
from finetune_assets.export.ollama.served_checks import answered
from finetune_assets.export.ollama.server import upload as ollama_upload
from finetune_assets.export.ollama.server.api import answers, digests
from finetune_assets.export.ollama.server.temporary import serving
from finetune_assets.reporting.errors import StepFailed
from tests.conftest import MiniProject
from tests.machine.test_disk import small_disk
from tests.support.events import json_into
from tests.support.history_fixtures import make_chain, plan_of
from tests.support.ollama.fixtures import Files, needs_server, put, served, tiny_files
from tests.support.servers.tcp_proxy import Fault, Proxy

pytestmark = needs_server
NAME = "tiny:latest"
MIB = 2**20


class Case:
    """A model in production, and the one that is to follow it. Ask llama.cpp once: it takes a while."""

    def __init__(self, files: Files):
        self.old, self.new = served(files.q8_0, system="one"), served(files.f32, system="two")
        self.replies = {model.sha256: expected(model) for model in (self.old, self.new)}
        self.events: list[dict[str, Any]] = []

    def reply(self, model: OllamaModel) -> Expected:
        return self.replies[model.sha256]

    def put(self, host: str, model: OllamaModel) -> str:
        self.events.clear()
        return put(host, model, replies={NAME: self.reply(model)}, progress=json_into(self.events))[NAME].digest

    def said(self) -> list[str]:
        return [event["text"] for event in self.events if event["event"] == "message"]

    def check_serves(self, host: str, model: OllamaModel, digest: str) -> None:
        """It is all that there is under these names, and it answers."""
        from ollama import Client

        assert digests(host) == {NAME: digest}
        checks = answered(Client(host=host, timeout=300, trust_env=False), NAME, self.reply(model))
        assert [check for check in checks if not check.ok] == []

    def fails(self, host: str, through: str, words: str) -> str:
        """The message of a creation that fails, after which the old model still serves."""
        before = digests(host)[NAME]
        with pytest.raises(StepFailed, match=words) as caught:
            self.put(through, self.new)
        assert caught.value.hint is not None and "what it served before is unchanged" in caught.value.hint
        self.check_serves(host, self.old, before)
        return caught.value.message


@pytest.fixture(scope="module")
def case(smollm2: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Case:
    return Case(tiny_files(smollm2, tmp_path_factory, request.config))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("models")) as address:
        yield address


@pytest.fixture
def host(server: str, case: Case) -> Iterator[str]:
    """The server, serving the old model alone."""
    from ollama import Client

    case.put(server, case.old)
    yield server
    for name in digests(server):
        Client(host=server, trust_env=False).delete(name)


@pytest.fixture
def proxy(host: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setattr(ollama_upload, "PAUSE", 0.1)
    with Proxy(host) as made:
        yield made


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            Fault("POST /api/blobs", answer=("500 Internal Server Error", '{"error": "no luck today"}')),
            "refused tiny-f32.gguf: HTTP 500: no luck today",
        ),
        (Fault("POST /api/blobs", answer=("502 Bad Gateway", "<html>")), "refused tiny-f32.gguf: HTTP 502"),
        (
            Fault("POST /api/create", answer=("500 Internal Server Error", '{"error": "no luck"}')),
            "refused tiny: no lu",
        ),
        (Fault("POST /api/create", after=0), "was lost while making tiny"),
        (Fault("POST /api/show", answer=("500 Internal Server Error", "{}")), "was lost while making tiny: .*500"),
        (
            Fault("POST /api/chat", answer=("500 Internal Server Error", '{"error": "no memory"}')),
            "refused tiny: no me",
        ),
        (Fault("POST /api/chat", after=0), "was lost while making tiny"),
        (Fault("POST /api/copy", answer=("500 Internal Server Error", '{"error": "oh"}')), "refused tiny: oh"),
        (Fault("POST /api/blobs", after=4 * MIB), "was lost while making tiny"),
    ],
)
def test_the_old_model_goes_on_and_a_retry_succeeds(case: Case, host: str, proxy: Proxy, fault: Fault, words: str):
    with proxy.spoiling(fault):
        case.fails(host, proxy.host, words)
    sent = [line for line in proxy.seen if line.startswith("POST /api/blobs")]
    assert len(sent) == (ollama_upload.ATTEMPTS if fault.after == 4 * MIB else 1)
    case.check_serves(host, case.new, case.put(proxy.host, case.new))


def test_an_upload_that_breaks_off_is_sent_again(case: Case, host: str, proxy: Proxy):
    with proxy.spoiling(Fault("POST /api/blobs", after=4 * MIB, times=2)):
        made = case.put(proxy.host, case.new)
    case.check_serves(host, case.new, made)
    assert sum("sending again" in text for text in case.said()) == 2
    steps = [event["step"] for event in case.events if event["event"] == "step"]
    assert steps[-1] == round(case.new.gguf.stat().st_size / 1e6)


def test_a_slow_server_is_waited_for(case: Case, host: str, proxy: Proxy):
    with proxy.spoiling(Fault("", delay=1.5)):
        assert answers(proxy.host) is not None
        case.check_serves(host, case.new, case.put(proxy.host, case.new))


def test_a_server_that_is_gone(case: Case, tmp_path: Path):
    with serving(tmp_path / "models") as host:
        before = case.put(host, case.old)
    with pytest.raises(StepFailed, match="was lost while making tiny"):
        case.put(host, case.new)
    with serving(tmp_path / "models") as host:
        case.check_serves(host, case.old, before)
        case.check_serves(host, case.new, case.put(host, case.new))


def kill(models: Path) -> None:
    """Kill the server over these models and what it started: they are a process group, below this process."""
    for child in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for pid in child.read_text().split():
            if f"OLLAMA_MODELS={models.resolve()}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                os.killpg(int(pid), signal.SIGKILL)


@pytest.mark.parametrize(
    "fault", [Fault("POST /api/blobs", after=4 * MIB, cut=False), Fault("POST /api/chat", after=0, cut=False)]
)
def test_a_server_killed_at_work(case: Case, tmp_path: Path, fault: Fault):
    if not Path("/proc/self/task").is_dir():
        pytest.skip("finding the server takes Linux")
    with serving(tmp_path / "models") as host, Proxy(host) as proxy:
        before = case.put(host, case.old)
        fault.then = lambda: kill(tmp_path / "models")
        with proxy.spoiling(fault), pytest.raises(StepFailed, match="was lost while making tiny") as caught:
            case.put(proxy.host, case.new)
        assert "see that it is running" in str(caught.value.hint)
        assert answers(host) is None
    with serving(tmp_path / "models") as host:
        left = set(digests(host)) - {NAME}
        assert left == (set() if "blobs" in fault.request else {"tiny:staging-latest"}), "it could not be swept"
        assert digests(host)[NAME] == before
        case.check_serves(host, case.new, case.put(host, case.new))


def test_a_server_whose_disk_fills_up(case: Case, tmp_path: Path):
    models = tmp_path / "models"
    models.mkdir()
    with small_disk(models, "24m"), serving(models) as host:
        before = case.put(host, case.old)
        case.fails(host, host, "refused tiny-f32.gguf: HTTP 500: .*no space left on device")
        # at the last byte of the weights, and at each of the small files after them
        subprocess.run(["mount", "-o", "remount,size=64m", str(models)], check=True)
        filler, failures, new = models / "filler", [], case.new
        while True:
            room = new.gguf.stat().st_size // 4096 + len(failures)
            filler.write_bytes(bytes(4096 * (os.statvfs(models).f_bavail - room)))
            try:
                made = case.put(host, new)
                break
            except StepFailed as error:
                failures.append(error.message)
            filler.unlink()
            (models / "blobs" / f"sha256-{new.sha256}").unlink(missing_ok=True)
            case.check_serves(host, case.old, before)
        assert len(failures) > 2
        case.check_serves(host, new, made)


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """An ordinary web server."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()
        thread.join()


def test_an_address_that_is_not_ollamas(mini: MiniProject, elsewhere: str, monkeypatch: pytest.MonkeyPatch):
    make_chain(mini)
    monkeypatch.setenv("OLLAMA_HOST", elsewhere)
    mini.edit(ollama={"system": "Be brief."})
    with pytest.raises(StepFailed) as caught:
        make_chain(mini)
    assert caught.value.message == f"{elsewhere} is not an Ollama server: /api/version returned HTTP 404"
    assert caught.value.hint == "set OLLAMA_HOST to the server's address, or unset it"
    mini.edit(ollama={"system": None})
    assert plan_of(mini)["ollama_model"].reasons[0].startswith(f"the Ollama server at {elsewhere} cannot be asked")
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    assert plan_of(mini)["ollama_model"].state == "fresh"
