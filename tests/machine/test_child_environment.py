"""The environment of child processes: what they need, and no secret."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from finetune_assets.export.gguf import converter
from finetune_assets.export.ollama.server.temporary import serving
from finetune_assets.machine import child_environment
from finetune_assets.machine.child_environment import Group
from finetune_assets.models import wheels as packaged
from finetune_assets.recipe import ModelSection
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.worker import launch
from finetune_assets.worker.tasks.task import Task
from tests.conftest import REPOSITORY
from tests.worker.test_launch import HEAD

SECRETS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN", "AZURE_CLIENT_SECRET", "GOOGLE_APPLICATION_CREDENTIALS", "FINETUNE_FAILURE_WEBHOOK",
    "DAGSTER_CLOUD_API_TOKEN", "DATABASE_URL", "OPENAI_API_KEY", "WANDB_API_KEY", "GITHUB_TOKEN", "NVIDIA_API_KEY",
    "OLLAMA_API_KEY", "PYTHON_KEYRING_PASSWORD", "HF_ENDPOINT", "SSH_AUTH_SOCK", "NPM_CONFIG__AUTH",
)  # fmt: skip
VALUE = "very-secret-4711"
NEEDED = {"LANG": "C.UTF-8", "OMP_NUM_THREADS": "3", "PYTHONHASHSEED": "7", "HF_HOME": "/nowhere/hf", "LC_TIME": "C"}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, VALUE)
    for name, value in NEEDED.items():
        monkeypatch.setenv(name, value)


def check(seen: dict[str, str], needed: dict[str, str]) -> None:
    assert not set(seen) & set(SECRETS)
    assert VALUE not in seen.values()
    assert {name: seen.get(name) for name in needed} == needed
    assert seen["PATH"] == os.environ["PATH"] and seen["HOME"]


@pytest.mark.parametrize("trust", [False, True])
def test_a_worker_sees_no_secret(trust: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    script = tmp_path / "worker.py"
    script.write_text(HEAD + "send(event='done', report=dict(os.environ))\n")
    model = ModelSection(model_name_or_path="org/tiny", trust_remote_code=trust)
    task = Task(task="train", out=tmp_path, model=model)
    lease = {"CUDA_VISIBLE_DEVICES": "2"}
    seen = launch.run(task, print, env=lease, worker=[sys.executable, "-S", str(script)])
    check(seen, {**NEEDED, **lease, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"})
    assert (seen.get("HF_MODULES_CACHE") == os.devnull) is not trust


def test_a_worker_finds_no_token_of_a_hub_in_a_file_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(VALUE)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    script = tmp_path / "worker.py"
    body = "from huggingface_hub import get_token\nsend(event='done', report={'token': get_token()})\n"
    script.write_text(HEAD + body)
    task = Task(task="train", out=tmp_path, model=ModelSection(model_name_or_path="org/tiny"))
    assert launch.run(task, print, worker=[sys.executable, str(script)]) == {"token": None}


@pytest.mark.parametrize("trust", [False, True])
def test_the_converter_sees_no_secret(trust: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "environment.json"
    body = f"import json, os\nopen({str(made)!r}, 'w').write(json.dumps(dict(os.environ)))\nraise SystemExit(1)\n"
    (tmp_path / converter.SCRIPT).write_text(body)
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    monkeypatch.setenv("NO_LOCAL_GGUF", "1")  # would make it take another gguf package than its own
    with pytest.raises(StepFailed):
        converter._run(tmp_path, tmp_path, [], tmp_path / "none.gguf", tmp_path, trust=trust)
    seen = json.loads(made.read_text())
    check(seen, {**NEEDED, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"})
    assert "LLAMA_CPP_DIR" not in seen and "NO_LOCAL_GGUF" not in seen


def test_pip_sees_its_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "environment.json"
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    body = f"import json, os\nopen({str(made)!r}, 'w').write(json.dumps(dict(os.environ)))\nraise SystemExit(1)\n"
    (tmp_path / "pip" / "__main__.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    own = {"PIP_INDEX_URL": "https://user:password@index.example/simple", "HTTPS_PROXY": "http://proxy.example:1"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StepFailed):
        packaged.fetch_wheel("nothing==1", "0" * 64, tmp_path / "cache")
    check(json.loads(made.read_text()), {"LANG": NEEDED["LANG"], **own})


def test_an_ollama_server_sees_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, binary = tmp_path / "environment", tmp_path / "ollama"
    binary.write_text(f"#!/bin/sh\nenv > '{made}'\nexit 1\n")
    binary.chmod(0o755)
    monkeypatch.setenv("OLLAMA_KEEP_ALIVE", "7m")
    with pytest.raises(StepFailed, match="ended with exit code 1"), serving(tmp_path / "models", binary=binary):
        pytest.fail("it serves")
    lines = [line.partition("=") for line in made.read_text().splitlines()]
    seen = {name: value for name, _, value in lines}
    check(seen, {"OLLAMA_KEEP_ALIVE": "7m", "OMP_NUM_THREADS": "3"})


def test_the_lists_are_those_of_the_documentation() -> None:
    """docs/trust.md: a row for each group, with all of its names, and no other."""
    page = (REPOSITORY / "docs" / "trust.md").read_text(encoding="utf-8")
    groups = {name: group for name, group in vars(child_environment).items() if isinstance(group, Group)}
    rows = {row[1]: row[2] for row in re.finditer(r"^\| `([A-Z]+)` \| (.*?) \|", page, re.MULTILINE)}
    assert set(rows) == {*groups, "PIP"}
    for name, group in groups.items():
        expected = {*group.names, *(f"{prefix}*" for prefix in group.prefixes)}
        assert set(re.findall(r"`([^`]+)`", rows[name])) == expected, name
