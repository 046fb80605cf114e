"""Base models from a hub, against one on the loopback: what is fetched, how it goes on, what is said on failure."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.models.test_base_model import safetensors
from tests.support.servers.hub_server import Faults, HubServer, Repository

MODEL = "someone/some-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRET = "hf_very_secret"
WEIGHTS = safetensors(bytes(range(256)) * 4096)  # 1 MiB
WANTED = ["config.json", "model.safetensors", "tokenizer.json"]

SCRIPT = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores Ctrl-C
from pathlib import Path
from finetune_assets.models import base_model
from finetune_assets.reporting.errors import FinetuneError
from finetune_assets.recipe import ModelSection
name, revision, out = sys.argv[1:]
section = ModelSection(model_name_or_path=name, model_revision=revision)
Path(out).mkdir()
tell = lambda event: print(event.text, file=sys.stderr)
try:
    print(json.dumps(base_model.fetch(section, Path(out), Path(out) / "cache", Path(out), tell)))
except FinetuneError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@dataclass
class Client:
    """Fetches from the hub, each time in a process of its own with the same cache."""

    hub: HubServer
    folder: Path
    count: int = 0

    def start(self, name: str = MODEL, revision: str = "main", **environment: str) -> subprocess.Popen[str]:
        self.count += 1
        own = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.folder / "hf"), "HF_HUB_OFFLINE": "0"}
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, name, revision, str(self.out)],
            env={**os.environ, "NO_PROXY": "127.0.0.1", **own, **environment},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def out(self) -> Path:
        return self.folder / f"out-{self.count}"

    def fetch(self, *arguments: str, **environment: str) -> dict[str, Any]:
        """Fetch and expect that it works: the facts."""
        said, errors = self.start(*arguments, **environment).communicate(timeout=90)
        assert said.startswith("{"), said + errors
        return json.loads(said)

    def fail(self, *arguments: str, **environment: str) -> str:
        """Fetch and expect a failed step: what was said."""
        process = self.start(*arguments, **environment)
        said, errors = process.communicate(timeout=90)
        assert process.returncode == 1, said + errors
        assert "Traceback" not in errors
        assert SECRET not in said + errors
        return said

    def names(self) -> list[str]:
        return sorted(path.name for path in self.out.iterdir())


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    folder = tmp_path / "repository"
    (folder / "onnx").mkdir(parents=True)
    for name in (
        "config.json",
        "tokenizer.json",
        "onnx/config.json",
        "modeling_x.py",
        "pytorch_model.bin",
        "consolidated.safetensors",
    ):
        (folder / name).write_text(json.dumps({"file": name}))
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "onnx" / "model.safetensors").write_bytes(b"another format")
    with HubServer() as server:
        server.repositories[MODEL] = Repository(folder, COMMIT, branches=("main", "release/1.0"))
        yield server


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub, tmp_path)


@pytest.mark.parametrize("revision", ["main", "release/1.0", COMMIT])
def test_a_revision_becomes_a_commit_and_only_wanted_files_come(client: Client, revision: str):
    facts = client.fetch(MODEL, revision)
    assert facts == {"source": MODEL, "revision": COMMIT}
    assert client.names() == WANTED
    assert (client.out / "model.safetensors").read_bytes() == WEIGHTS
    assert not any(path.is_symlink() for path in client.out.iterdir())
    assert client.hub.fetched() == WANTED
    assert not [seen.path for seen in client.hub.seen if "onnx" in seen.path]


def test_the_token_goes_to_the_hub_and_opens_a_gated_model(client: Client):
    client.hub.repositories[MODEL].gated = True
    client.hub.tokens.add(SECRET)
    client.fetch(HF_TOKEN=SECRET)
    assert client.names() == WANTED
    assert not [seen for seen in client.hub.seen if seen.token != SECRET]


@pytest.mark.parametrize("token", ["", SECRET])
def test_a_gated_model(client: Client, token: str):
    client.hub.repositories[MODEL].gated = True
    said = client.fail(HF_TOKEN=token)
    assert said == f"base model {MODEL} (revision main) is gated\naccept its terms on the hub and set HF_TOKEN\n"
    assert not client.names()


@pytest.mark.parametrize("token", ["", SECRET])
def test_a_model_that_is_not_there(client: Client, token: str):
    said = client.fail("someone/else", HF_TOKEN=token)
    if token:
        assert f"base model not found: someone/else (revision main) is not on {client.hub.url}" in said
        assert "model.model_name_or_path" in said
    else:  # as the hub answers strangers: it might be a private one
        assert f"{client.hub.url} returned HTTP 401\nthere is no such model, or HF_TOKEN is not set" in said


@pytest.mark.parametrize("revision", ["v9", "f" * 40])
def test_a_revision_that_is_not_there(client: Client, revision: str):
    said = client.fail(MODEL, revision)
    assert f"base model not found: {MODEL} (revision {revision}) is not on" in said
    assert "model.model_revision" in said


def test_a_name_that_no_hub_has(client: Client):
    assert "cannot download base model someone/a..b (revision main)" in client.fail("someone/a..b")
    assert not client.hub.seen


@pytest.mark.parametrize(("status", "hint"), [(500, "retry later"), (401, "HF_TOKEN is"), (403, "HF_TOKEN is")])
def test_a_hub_that_refuses(client: Client, status: int, hint: str):
    client.hub.faults.file_status["model.safetensors"] = status
    if status == 500:
        client.hub.faults.status = status  # at the first call: the library asks again and again for a file
    said = client.fail(HF_TOKEN=SECRET)
    assert f"{client.hub.url} returned HTTP {status}" in said and hint in said


def test_a_hub_that_says_nothing_is_given_up(client: Client):
    client.hub.faults.mute = True
    began = time.monotonic()
    assert f"{client.hub.url} is not reachable" in client.fail(HF_HUB_ETAG_TIMEOUT="1")
    assert time.monotonic() - began < 30  # the server would hold the line for a minute


def test_a_hub_that_is_a_login_page(client: Client):
    client.hub.faults.html = True
    assert "does not respond like a model hub" in client.fail()


def test_offline(client: Client):
    assert "HF_HUB_OFFLINE is set" in client.fail(HF_HUB_OFFLINE="1")


def test_a_commit_in_the_cache_needs_no_hub(client: Client):
    client.fetch(MODEL, COMMIT)
    client.hub.seen.clear()
    client.hub.faults.status = 500
    assert client.fetch(MODEL, COMMIT)["revision"] == COMMIT
    assert client.fetch(MODEL, COMMIT, HF_HUB_OFFLINE="1")["revision"] == COMMIT
    assert client.names() == WANTED
    assert not client.hub.seen


def test_a_lost_connection_is_taken_up_where_it_broke(client: Client):
    weights = safetensors(WEIGHTS * 16)  # larger than the pieces of 10 MiB that the library writes
    (client.hub.repositories[MODEL].folder / "model.safetensors").write_bytes(weights)
    client.hub.faults.cut["model.safetensors"] = 12_000_000
    client.fetch()
    assert (client.out / "model.safetensors").read_bytes() == weights
    bodies = [seen for seen in client.hub.seen if seen.method == "GET" and "/cdn/" in seen.path]
    assert [seen.range for seen in bodies] == [None, "bytes=10485760-"]


def test_a_killed_download_keeps_the_files_it_had(client: Client):
    client.hub.faults.stall["model.safetensors"] = 300_000
    process = client.start()
    try:
        assert client.hub.stalled.wait(60)
        snapshot = client.folder / "hf" / "hub" / "models--someone--some-model" / "snapshots" / COMMIT
        for _ in range(200):
            if (snapshot / "config.json").exists() and (snapshot / "tokenizer.json").exists():
                break
            client.hub.closing.wait(0.05)
    finally:
        process.kill()
        process.communicate()
    assert not client.names()
    client.hub.faults = Faults()
    client.hub.seen.clear()
    client.fetch()
    assert client.hub.fetched() == ["model.safetensors"]
    assert (client.out / "model.safetensors").read_bytes() == WEIGHTS


def test_a_long_download_says_how_far_it_is_and_can_be_interrupted(client: Client):
    (client.hub.repositories[MODEL].folder / "model.safetensors").write_bytes(WEIGHTS * 120)
    client.hub.faults.drip["model.safetensors"] = 0.15  # 18 s for all of it
    process = client.start()
    assert process.stderr is not None
    try:
        lines = [process.stderr.readline() for _ in range(2)]
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert lines[0] == f"downloading {MODEL} at {COMMIT}\n"
    assert re.fullmatch(rf"downloading {MODEL} at {COMMIT}: [1-9]\d+ MB so far\n", lines[1])
    assert process.returncode not in (0, 1)
    assert time.monotonic() - began < 10
    assert not client.names()
    assert not list((client.folder / "hf").rglob("*.incomplete"))


def test_a_missing_shard_is_named(client: Client):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (client.hub.repositories[MODEL].folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json names model-2.safetensors, which does not exist" in client.fail()
