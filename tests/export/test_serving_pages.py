"""Commands that serve what was made with other people's programs: every word arrives, and the real ones answer."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from finetune_assets.assets.all_assets import STEPS
from finetune_assets.assets.step_asset import page
from finetune_assets.export.ollama.server.temporary import free_port, serving
from finetune_assets.export.serving_commands import LLAMA_SERVER, OLLAMA, commands, ollama
from finetune_assets.recipe import Recipe
from finetune_assets.recipe.file import load_recipe
from finetune_assets.store.artifact import Artifact
from tests.cli.test_cli import finetune
from tests.conftest import MiniProject, make_mini
from tests.support.history_fixtures import make_chain
from tests.support.ollama.fixtures import Files, needs_server, tiny_files, with_weights

SYSTEM = """You're "Mizan" $HOME `id` \\ {{ .X }} 好"""
STAND_IN = """#!/usr/bin/env python3
import json, os, sys
print(json.dumps({"program": sys.argv[0].rpartition("/")[2], "words": sys.argv[1:],
                  "environment": {k: v for k, v in os.environ.items() if k.startswith("OLLAMA_")}}))
"""


@pytest.fixture
def chain(tmp_path: Path) -> tuple[MiniProject, dict[str, Artifact]]:
    """A finished chain in a folder whose name a shell would take apart."""
    (tmp_path / "it's $HOME").mkdir()
    project = make_mini(tmp_path / "it's $HOME")
    project.edit(model={"default_system": SYSTEM}, gguf={"types": ["q8_0", "f16"]})
    project.edit(ollama={"types": ["f16"], "num_ctx": 1024, "stop": ["it's", "好"], "top_k": 1, "repeat_penalty": 1.5})
    made = make_chain(project)
    (made["merged_model"].path / "config.json").write_text('{"max_position_embeddings": 512}')
    return project, made


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment in which each program says how it was called."""
    (tmp_path / "bin").mkdir()
    for name in ("ollama", "llama-server", "vllm", "curl"):
        (tmp_path / "bin" / name).write_text(STAND_IN)
        (tmp_path / "bin" / name).chmod(0o755)
    return {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def called(lines: list[str], environment: dict[str, str]) -> list[dict[str, Any]]:
    """What a shell makes of lines."""
    done = subprocess.run(["bash", "-c", "\n".join(lines)], env=environment, capture_output=True, text=True)
    assert not done.stderr and done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def recipe_of(project: MiniProject) -> Recipe:
    return load_recipe(project.recipe_path())


def body(call: dict[str, Any]) -> dict[str, Any]:
    assert call["program"] == "curl" and call["words"][1:4] == ["-H", "Content-Type: application/json", "-d"]
    return json.loads(call["words"][4])


def test_ollama_from_our_own_store(chain: tuple[MiniProject, dict[str, Artifact]], shell: dict[str, str]) -> None:
    project, made = chain
    lines = commands("ollama_model", made["ollama_model"], recipe_of(project), project.ollama_models)
    assert lines[0] == "# no Ollama server answered at http://127.0.0.1:9"
    serve, *runs, curl = called(lines, shell)
    assert serve["words"] == ["serve"] and serve["environment"] == {"OLLAMA_MODELS": str(project.ollama_models)}
    assert [call["words"] for call in runs] == [["run", "mini"], ["run", "mini:f16"]]
    assert curl["words"][0] == f"{OLLAMA}/v1/chat/completions"
    # the model brings its system message and its options
    assert body(curl) == {"model": "mini", "messages": [{"role": "user", "content": "Who are you?"}]}


def test_ollama_on_a_server(shell: dict[str, str]) -> None:
    facts = {"name": "mini", "models": {"mini:latest": {}, "mini:q8_0": {}}, "where": "server"}
    assert ollama({**facts, "place": OLLAMA}, Path("models")) == ["ollama run mini", "ollama run mini:q8_0"]
    (call, _) = called(ollama({**facts, "place": "https://gpu.local:443/my ollama"}, Path("models")), shell)
    assert call["environment"] == {"OLLAMA_HOST": "https://gpu.local:443/my ollama"}


def test_llama_server_and_vllm(chain: tuple[MiniProject, dict[str, Artifact]], shell: dict[str, str]) -> None:
    project, made = chain
    recipe, merged = recipe_of(project), made["merged_model"].path
    lines = commands("gguf_file", made["gguf_file"], recipe, project.ollama_models)
    assert lines[0] == "# or with one of mini-f16.gguf in its place:"
    serve, curl = called(lines, shell)
    served = str(made["gguf_file"].path / "mini-q8_0.gguf")
    assert serve["words"] == [
        *("-m", served, "--jinja", "--alias", "mini"),
        *["-c", "1024", "--host", "127.0.0.1", "--port", "8080"],
    ]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Who are you?"}]
    asked = {"model": "mini", "stop": ["it's", "好"], "top_k": 1, "messages": messages}
    assert curl["words"][0] == f"{LLAMA_SERVER}/v1/chat/completions" and body(curl) == {**asked, "repeat_penalty": 1.5}

    serve, curl = called(commands("merged_model", made["merged_model"], recipe, project.ollama_models), shell)
    assert serve["words"] == [
        *("serve", str(merged), "--served-model-name", "mini", "--chat-template", str(merged / "chat_template.jinja")),
        *["--max-model-len", "512", "--host", "127.0.0.1", "--port", "8000"],  # vLLM refuses more than the model has
    ]
    assert curl["words"][0] == "http://127.0.0.1:8000/v1/chat/completions"
    assert body(curl) == {**asked, "repetition_penalty": 1.5}


def test_pages_and_command_line(chain: tuple[MiniProject, dict[str, Artifact]]) -> None:
    project, made = chain
    said = finetune(project, "artifacts", "mini").stdout
    pages = {step.name: page(step, made[step.name], recipe_of(project), project, reused=False) for step in STEPS
             if step.name in ("merged_model", "ollama_model")}  # fmt: skip
    for name in ("merged_model", "gguf_file", "ollama_model"):
        lines = commands(name, made[name], recipe_of(project), project.ollama_models)
        assert "\n".join([f"serve {name}", *(f"  {line}" for line in lines)]) in said
        if name in pages:
            assert pages[name]["serve it"].value == "\n".join(["```bash", *lines, "```"])
    assert not commands("lora_adapter", made["lora_adapter"], recipe_of(project), project.ollama_models)


@pytest.fixture(scope="module")
def files(smollm2: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Files:
    return tiny_files(smollm2, tmp_path_factory, request.config)


@pytest.fixture
def small(mini: MiniProject, files: Files, monkeypatch: pytest.MonkeyPatch) -> tuple[MiniProject, dict[str, Artifact]]:
    """A finished chain with weights that engines can run."""
    with_weights(mini, files, monkeypatch)
    mini.edit(gguf={"types": ["f32"]}, ollama={"num_ctx": 256, "system": SYSTEM})
    return mini, make_chain(mini)


def first_words(lines: list[str], usual: str, address: str) -> dict[str, Any]:
    """What an endpoint answers to the curl among lines, with the address of a server that is there."""
    (curl,) = (line for line in lines if line.startswith("curl "))
    command = curl.replace(usual, address).replace('"messages"', '"max_tokens": 3, "messages"')
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    return json.loads(done.stdout)


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")


@needs_server
@needs_curl
def test_a_real_ollama_answers_them(small: tuple[MiniProject, dict[str, Artifact]]) -> None:
    project, made = small
    with serving(project.ollama_models) as host:
        lines = commands("ollama_model", made["ollama_model"], recipe_of(project), project.ollama_models)
        answer = first_words(lines, OLLAMA, host)
    assert answer["model"] == "mini" and answer["choices"][0]["message"]["content"], answer
    assert answer["usage"]["prompt_tokens"] > len(SYSTEM) / 2, "the system message is the model's"


@pytest.mark.skipif(shutil.which("llama-server") is None, reason="no llama-server on the PATH")
@needs_curl
def test_a_real_llama_server_answers_them(small: tuple[MiniProject, dict[str, Artifact]]) -> None:
    project, made = small
    lines = commands("gguf_file", made["gguf_file"], recipe_of(project), project.ollama_models)
    address = f"http://127.0.0.1:{free_port()}"
    start = lines[0].replace("--port 8080", f"--port {address.rpartition(':')[2]}")
    with subprocess.Popen(shlex.split(start), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(f"{address}/health", server)
            answer = first_words(lines, LLAMA_SERVER, address)
        finally:
            server.terminate()
    assert answer["model"] == "mini" and answer["usage"]["prompt_tokens"] > len(SYSTEM) / 2, answer


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} does not answer")
