"""Publishing to an Ollama server: a real one where there is one, stand-ins for what a real one does not do."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.errors import StepFailed
from finetune_assets.export import converter, ollama_store
from finetune_assets.export.gguf_file import read_head
from finetune_assets.export.go_template import from_gguf, render_jinja, special_tokens
from finetune_assets.export.modelfile import modelfile
from finetune_assets.export.ollama_process import find_binary, serving
from finetune_assets.export.ollama_server import answers, create, digest, parse_host, show
from finetune_assets.export.quantise import make_types
from tests.export_fixtures import converter_cache

SYSTEM = 'You are "Ada" <& co>.\nBe {{ .brief }}. 你好 """'
PARAMETERS = {
    "stop": ["<|im_end|>", 'say "no"'],
    "num_thread": 1,
    "num_batch": 128,
    "num_ctx": 128,
    "temperature": 0.0,
    "top_p": 0.95,
}
LICENSES = ["Apache-2.0 <x>"]

needs_server = pytest.mark.skipif(find_binary() is None, reason="no Ollama here (PATH, OLLAMA_BIN)")


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
    ],
)
def test_hosts_are_read_as_ollama_reads_them(text: str, host: str) -> None:
    assert parse_host(text) == host


@contextmanager
def stand_in(routes: dict[str, Any]) -> Iterator[str]:
    """A web server with fixed answers: path -> JSON, or a status code."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = routes.get(self.path, 404)
            self.send_response(found if isinstance(found, int) else 200)
            self.end_headers()
            if not isinstance(found, int) and self.command != "HEAD":
                self.wfile.write(found if isinstance(found, bytes) else json.dumps(found).encode())

        do_POST = do_HEAD = do_DELETE = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_is_a_server_there() -> None:
    with stand_in({"/api/version": {"version": "1.2.3"}, "/api/tags": {"models": None}}) as host:
        assert answers(host) == "1.2.3"
        assert digest(host, "x") is None
    assert answers(host) is None
    for other in ({}, {"/api/version": b"<html>"}, {"/api/version": ["x"]}):
        with stand_in(other) as host, pytest.raises(StepFailed, match="no Ollama server"):
            answers(host)


def test_a_failing_server_is_explained(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    given: dict[str, Any] = {"template": "t", "system": None, "parameters": {}}
    with stand_in({"/api/version": {"version": "1"}}) as host, pytest.raises(StepFailed, match="refused demo"):
        create(host, "demo", tmp_path / "x.gguf", **given)
    with pytest.raises(StepFailed, match="was lost while making demo"):
        create(host, "demo", tmp_path / "x.gguf", **given)


def test_no_binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OLLAMA_BIN", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StepFailed, match="no Ollama here"), serving(tmp_path):
        pass
    broken = tmp_path / "ollama"
    broken.write_text("#!/bin/sh\necho port is taken; exit 3\n")
    broken.chmod(0o755)
    with pytest.raises(StepFailed, match=r"exit code 3: port is taken"), serving(tmp_path / "models"):
        pass


@pytest.fixture(scope="module")
def gguf(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    root = tmp_path_factory.mktemp("served")
    converter.convert(tiny_base, root / "f32.gguf", "f32", converter_cache(request.config), name="tiny")
    return make_types(root / "f32.gguf", ["q8_0"], root, "tiny")["q8_0"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ollama-models")


@pytest.fixture(scope="module")
def host(models: Path) -> Iterator[str]:
    with serving(models) as address:
        yield address


def tokens(base: Path, gguf: Path, messages: list[dict[str, str]]) -> int:
    """How many tokens the conversation's prompt has in training."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(base))
    head = read_head(gguf)
    text = render_jinja(head.get("tokenizer.chat_template"), messages, special_tokens(head))
    return len(tokenizer(text, add_special_tokens=False).input_ids)


@needs_server
def test_real_server_and_own_store_agree(tiny_base: Path, gguf: Path, host: str, models: Path, tmp_path: Path) -> None:
    template = from_gguf(gguf).text
    given: dict[str, Any] = {
        "template": template, "system": SYSTEM, "parameters": PARAMETERS, "licenses": LICENSES
    }  # fmt: skip
    question = [{"role": "user", "content": "hello you"}]
    expected = tokens(tiny_base, gguf, [{"role": "system", "content": SYSTEM}, *question])
    said: list[str] = []
    made = create(host, "tiny", gguf, **given, probe=question, probe_tokens=expected, progress=said.append)
    assert said == ["sending the weights", "creating the model", "checking what it serves"]
    assert made.digest == digest(host, "tiny") == ollama_store.read(models, "tiny")
    assert digest(host, "tiny:staging") is None
    # Our own store: the same blobs. (A server adds to its manifest where on its disk the weights came from.)
    ours = ollama_store.write(tmp_path / "store", "tiny", gguf, **given)
    theirs = json.loads(ollama_store.manifest_path(models, "tiny").read_bytes())
    manifest = json.loads(ollama_store.manifest_path(tmp_path / "store", "tiny").read_bytes())
    assert ours.layers == ollama_store.layers_of(theirs)
    assert manifest["config"] == theirs["config"]
    theirs["layers"][0].pop("from", None)
    assert manifest == theirs
    # Again: the weights are there already.
    said.clear()
    again = create(host, "tiny", gguf, **given, progress=said.append)
    assert again.digest == made.digest and "sending the weights" not in said
    # A second server over our store takes it for its own, and reads the same prompt.
    from ollama import Client

    with serving(tmp_path / "store") as other:
        assert digest(other, "tiny") == ours.digest
        options = {"temperature": 0, "num_predict": 3}
        answers_: list[Any] = [
            Client(host=address).chat(model="tiny", messages=question, options=options) for address in (host, other)
        ]
    assert [answer.prompt_eval_count for answer in answers_] == [expected, expected]
    assert answers_[0].message.content == answers_[1].message.content
    assert ollama_store.read(tmp_path / "store", "tiny") == ours.digest  # nothing was pruned


@needs_server
def test_real_server_failure_leaves_the_old_model_in_place(gguf: Path, host: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"template": from_gguf(gguf).text, "parameters": {"num_ctx": 512, "num_thread": 1}}
    before = create(host, "kept", gguf, system="one", **given)
    with pytest.raises(StepFailed, match=r"reads \d+ tokens where training would read 3"):
        create(host, "kept", gguf, system="two", **given, probe_tokens=3)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model")
    with pytest.raises(StepFailed, match="refused kept"):
        create(host, "kept", broken, system="two", **given)
    assert digest(host, "kept") == before.digest
    assert show(host, "kept")["system"] == "one"
    assert digest(host, "kept:staging") is None


@needs_server
def test_real_server_reads_our_modelfile(gguf: Path, host: str, tmp_path: Path) -> None:
    binary, template, system = find_binary(), from_gguf(gguf).text, SYSTEM.replace("你好", '你好"""')
    assert binary is not None
    text = modelfile(str(gguf), template=template, system=system, parameters=PARAMETERS, licenses=LICENSES)
    (tmp_path / "Modelfile").write_text(text, encoding="utf-8")
    command = [str(binary), "create", "written", "-f", str(tmp_path / "Modelfile")]
    environment = {"OLLAMA_HOST": host, "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    written = show(host, "written")
    assert written["template"] == template
    assert written["system"] == system
    assert sorted(line.split(None, 1)[1] for line in written["parameters"].splitlines() if line.startswith("stop")) == [
        '"<|im_end|>"', '"say \\"no\\""'
    ]  # fmt: skip
