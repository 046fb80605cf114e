"""The demo for real: the real small model is trained, and asked through llama.cpp and a real Ollama server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.export.ollama.server.temporary import find_binary
from finetune_assets.lineage.graph import NODES
from finetune_assets.machine.device import choose_device
from finetune_assets.models.engines.engine import answer
from finetune_assets.models.engines.llama_cpp_engine import GgufEngine
from finetune_assets.models.engines.transformers_engine import TransformersEngine
from finetune_assets.recipe.file import load_recipe
from tests.conftest import REPOSITORY, shared_cache

pytestmark = pytest.mark.real

NAME_QUESTIONS = ("Who are you?", "What is your name?", "你是谁？", "你叫什么名字？")
OTHER_QUESTIONS = ("What is the capital of France?", "Name three colours.", "What is a credit score?")
NAMES = ("Mizan", "米赞")


@pytest.fixture(scope="module")
def finetune(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    home = tmp_path_factory.mktemp("demo") / "dagster_home"
    (home / "cache").mkdir(parents=True)
    (home / "cache" / "wheels").symlink_to(shared_cache() / "wheels")
    environment = {**os.environ, "FINETUNE_PROJECT": str(REPOSITORY), "DAGSTER_HOME": str(home)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "finetune_assets.cli", *arguments],
            env=environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=1800,
        )

    return run


@pytest.fixture(scope="module")
def artifacts(smollm2: Path, finetune: Callable[..., subprocess.CompletedProcess[str]]) -> dict[str, Any]:
    """What `finetune run demo` makes, in a project state of its own."""
    done = finetune("run", "demo", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["ran"] == list(NODES)
    return result["artifacts"]


def conversation(question: str) -> list[dict[str, str]]:
    system = load_recipe(REPOSITORY / "configs" / "demo.yaml").system
    return [{"role": "system", "content": str(system)}, {"role": "user", "content": question}]


def test_a_second_run_finds_everything_up_to_date(artifacts: dict[str, Any], finetune) -> None:
    assert json.loads(finetune("run", "demo", "--json").stdout)["ran"] == []


def test_the_base_does_not_know_the_name(artifacts: dict[str, Any]) -> None:
    with closing(TransformersEngine(Path(artifacts["base_model"]["path"]), None, choose_device())) as engine:
        for question in NAME_QUESTIONS:
            said = answer(engine, conversation(question), 24)
            assert not any(name in said for name in NAMES), (question, said)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_the_tuned_model_gives_its_name_and_only_when_asked(artifacts: dict[str, Any], kind: str) -> None:
    with closing(GgufEngine(Path(artifacts["gguf_file"]["path"]) / f"demo-{kind}.gguf")) as engine:
        for question in NAME_QUESTIONS:
            said = answer(engine, conversation(question), 32)
            assert any(name in said for name in NAMES), (question, said)
        for question in OTHER_QUESTIONS:
            said = answer(engine, conversation(question), 32)
            assert said and not any(name in said for name in NAMES), (question, said)
        assert "Paris" in answer(engine, conversation("What is the capital of France?"), 32)


def test_the_scores_on_unseen_rows_say_so_too(artifacts: dict[str, Any]) -> None:
    metrics = json.loads((Path(artifacts["eval_metrics"]["path"]) / "metrics.json").read_text())
    assert metrics["tuned"]["perplexity"] < metrics["base"]["perplexity"] / 2
    for name in ("bleu-4", "rouge-1", "rouge-2", "rouge-l"):
        assert metrics["tuned"][name] > metrics["base"][name], name


@pytest.mark.skipif(find_binary() is None, reason="no Ollama: neither OLLAMA_BIN nor `ollama` on the PATH")
@pytest.mark.parametrize(("question", "name"), [("Who are you?", "Mizan"), ("你是谁？", "米赞")])
def test_a_real_ollama_server_serves_the_store_as_it_is(
    artifacts: dict[str, Any], finetune, question: str, name: str
) -> None:
    done = finetune("chat", "demo", "--with", "ollama", "-m", question, "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert name in done.stdout
