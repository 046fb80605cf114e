"""Secrets are masked in every message, log, manifest and database."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_assets.reporting.errors import StepFailed
from finetune_assets.reporting.masking import mask, mask_logging, masked, masked_error
from tests.conftest import REPOSITORY, MiniProject, make_mini, shared_cache
from tests.support.servers.hub_server import Faults, HubServer, Repository

SECRET, TOKEN = "geheim-7Q", "hf_abcdefghijklmnopqrstuvwxyzABCDEF12"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see http://user:pass@host:80/x?y=1 now", "see http://***@host:80/x?y=1 now"),
        ("'https://token@host/simple'", "'https://***@host/simple'"),
        ("http://u:p@@host/ and ftp://a:b@c", "http://***@host/ and ftp://***@c"),
        ("/f?X-Amz-Signature=abc123&x=1&X-Amz-Security-Token=q", "/f?X-Amz-Signature=***&x=1&X-Amz-Security-Token=***"),
        ("https://h/y?access_token=abc#f", "https://h/y?access_token=***#f"),
        ("https://hooks?apikey=1;sig=2", "https://hooks?apikey=***;sig=***"),
        ("Authorization: Bearer abc.def-1", "Authorization: Bearer ***"),
        ("'authorization': 'Basic dXNlcjpw'", "'authorization': 'Basic ***'"),
        (f"token {TOKEN}.", "token hf_***."),
        ("hf_transfer, hf_hub_download_with_retries_and_more", "hf_transfer, hf_hub_download_with_retries_and_more"),
        ("someone@example.com, a/b@main, git@github.com:x", "someone@example.com, a/b@main, git@github.com:x"),
        ("http://127.0.0.1:3000/a?b=c", "http://127.0.0.1:3000/a?b=c"),
        ("", ""),
    ],
)  # fmt: skip
def test_masked_texts(text: str, shown: str):
    assert mask(text) == shown
    assert mask(shown) == shown


def test_values_of_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_API_KEY", "value-of-a-key")
    monkeypatch.setenv("FINETUNE_FAILURE_WEBHOOK", "https://hooks.example/services/T0/B0/xyz")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://a:one%40two@x/simple https://long-token@y/simple")
    monkeypatch.setenv("HTTPS_PROXY", "user:proxy-password@proxy:3128")
    monkeypatch.setenv("SHORT_KEY", "yes")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "enabled")
    monkeypatch.setenv("SSH_KEY_PATH", "/home/someone/key")
    for secret in ("value-of-a-key", "https://hooks.example/services/T0/B0/xyz", "one%40two", "one@two", "long-token"):
        assert mask(f"<{secret}>") == "<***>"
    assert mask("proxy-password") == "***"
    for plain in ("yes", "enabled", "/home/someone/key", "proxy:3128"):
        assert mask(plain) == plain


def test_errors_and_their_causes():
    assert str(StepFailed(f"http://u:{SECRET}@h", f"see http://u:{SECRET}@h")) == "http://***@h\nsee http://***@h"
    first, second = ValueError(f"http://u:{SECRET}@h"), KeyError("x")
    second.__cause__, first.__context__ = first, second  # a ring, as Dagster makes them
    shown = masked_error(second)
    assert (str(shown), str(shown.__cause__)) == ("KeyError: 'x'", "ValueError: http://***@h")
    plain = ValueError("nothing")
    assert masked_error(plain) is plain


def test_json_values():
    value = {"a": [f"http://u:{SECRET}@h", 1, None], "template": f"http://u:{SECRET}@h"}
    assert masked(value, but=["template"]) == {"a": ["http://***@h", 1, None], "template": value["template"]}


def test_logs_of_libraries(caplog: pytest.LogCaptureFixture):
    before = logging.getLogRecordFactory()
    try:
        mask_logging()
        mask_logging()
        logging.getLogger("some.library").warning("retry %s in %d s", f"http://u:{SECRET}@h", 3)
        logging.getLogger("some.library").warning("plain %s", "text")
    finally:
        logging.setLogRecordFactory(before)
    assert [record.getMessage() for record in caplog.records] == ["retry http://***@h in 3 s", "plain text"]
    assert caplog.records[1].args == ("text",)


class Client:
    """A project whose base model is on a hub behind a password, and a command line without a network."""

    def __init__(self, project: MiniProject, hub: HubServer, folder: Path):
        self.project, self.hub = project, hub
        address = hub.url.replace("://", f"://user:{SECRET}@")
        self.environment = {
            **os.environ,
            "FINETUNE_PROJECT": str(project.root),
            "DAGSTER_HOME": str(project.home),
            "PYTHONPATH": str(REPOSITORY),
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(folder / "hf"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_ETAG_TIMEOUT": "2",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        }

    def finetune(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "finetune_assets.cli", *arguments],
            env=self.environment,
            cwd=self.project.root,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert SECRET not in done.stdout + done.stderr and TOKEN not in done.stdout + done.stderr
        return done

    def leaks(self) -> list[str]:
        """Return the files of DAGSTER_HOME that contain a secret, including databases and compute logs."""
        files = [path for path in self.project.home.rglob("*") if path.is_file() and not path.is_symlink()]
        assert any(path.suffix == ".db" for path in files)
        words = (SECRET.encode(), TOKEN.encode())
        return [str(path) for path in files if any(word in path.read_bytes() for word in words)]


@pytest.fixture
def client(tmp_path: Path, tiny_base: Path) -> Iterator[Client]:
    project = make_mini(tmp_path)
    project.edit(model={"model_name_or_path": "someone/some-model"})
    project.cache.mkdir(parents=True)
    (project.cache / "wheels").symlink_to(shared_cache() / "wheels")
    with HubServer() as hub:
        hub.repositories["someone/some-model"] = Repository(tiny_base, COMMIT)
        yield Client(project, hub, tmp_path)


def test_a_run_from_a_hub_behind_a_password(client: Client):
    done = client.finetune("run", "mini", "--to", "merged_model")
    assert done.returncode == 0, done.stderr
    assert client.hub.fetched()
    for arguments in (("plan", "mini"), ("artifacts", "mini", "--json"), ("explain", "mini/merged_model")):
        assert client.finetune(*arguments).returncode == 0
    assert not client.leaks()


@pytest.mark.parametrize(
    "faults",
    [Faults(status=500), Faults(status=401), Faults(html=True), Faults(mute=True), None],
    ids=["500", "401", "a page", "mute", "nobody"],
)
def test_a_hub_behind_a_password_that_fails(client: Client, faults: Faults | None):
    if faults is None:
        client.environment["HF_ENDPOINT"] = f"http://user:{SECRET}@127.0.0.1:9"
    else:
        client.hub.faults = faults
    done = client.finetune("run", "mini", "--to", "base_model")
    assert done.returncode == 1 and "base model" in done.stderr
    assert "***@127.0.0.1" in done.stderr
    assert client.finetune("run", "mini", "--to", "base_model", "--debug").returncode == 1
    assert not client.leaks()


def test_doctor(client: Client):
    found = {check["name"]: check for check in json.loads(client.finetune("doctor", "--json").stdout)}
    assert found["hub"]["state"] == "ok"
    client.environment["HF_ENDPOINT"] = f"http://user:{SECRET}@127.0.0.1:9"
    client.environment["OLLAMA_HOST"] = f"http://user:{SECRET}@127.0.0.1:9"
    client.finetune("doctor")


def test_an_unforeseen_error_of_a_step(client: Client):
    """Dagster records every error of a step with its causes."""
    script = f"""
import sys
from finetune_assets import cli
from finetune_assets.models import base_model
def fetch(*arguments):
    try:
        raise OSError("http://user:{SECRET}@host")
    except OSError as error:
        raise ValueError("cannot read http://user:{SECRET}@host") from error
base_model.fetch = fetch
sys.argv = ["finetune", "run", "mini", "--to", "base_model"]
cli.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=client.environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and SECRET not in done.stdout + done.stderr
    assert "ValueError: cannot read http://***@host" in done.stderr
    assert not client.leaks()
