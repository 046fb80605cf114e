"""A recipe with a Chinese name: the command line, Dagster and the sensors handle it from file to served model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster import DagsterInstance

from finetune_assets.assets.automation import chain
from finetune_assets.assets.keys import chain_key, job_name, word_of
from finetune_assets.cli import commands as cli
from finetune_assets.definitions import load_definitions
from finetune_assets.recipe import name_problem
from resources.dead_runs import unfinished_run_of
from tests.assets.test_unforeseen import finetune, steps
from tests.conftest import MiniProject
from tests.support.history_fixtures import plan_of

NAME = "客服"


@pytest.fixture
def project(mini: MiniProject, monkeypatch: pytest.MonkeyPatch) -> Iterator[MiniProject]:
    mini.recipe_path().rename(mini.recipe_path(NAME))
    mini.empty_base()
    monkeypatch.setattr(chain, "STEPS", steps("", lambda: ValueError()))
    yield mini


def command(project: MiniProject, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setenv("FINETUNE_PROJECT", str(project.root))
    monkeypatch.setenv("DAGSTER_HOME", str(project.home))
    monkeypatch.setattr(sys, "argv", ["finetune", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)


def test_it_works_from_end_to_end(
    project: MiniProject, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    command(project, monkeypatch, "run", NAME, "--json")  # stand-ins have no scores to print
    assert {item.state for item in plan_of(project, NAME).values()} == {"fresh"}
    assert (project.store / NAME / "ollama_model" / "CURRENT").is_file()
    for words in (("plan", NAME), ("artifacts", NAME), ("explain", f"{NAME}/gguf_file"), ("gc", NAME), ("gc",)):
        command(project, monkeypatch, *words)
    output = capfd.readouterr().out
    assert NAME in output and word_of(NAME) not in output
    with DagsterInstance.from_config(str(project.home)) as instance:
        (run,) = instance.get_runs(dg.RunsFilter(tags={"recipe": NAME}))
        assert run.is_success and run.job_name == job_name(NAME)
        assert unfinished_run_of(NAME, instance, chain_key(NAME)) is None
        definitions = load_definitions(project)
        repository = definitions.get_repository_def()
        sensor = repository.get_sensor_def(f"{word_of(NAME)}_retrain")
        with dg.build_sensor_context(instance, sensor_name=sensor.name, repository_def=repository) as context:
            assert sensor.evaluate_tick(context).skip_message == "everything is up to date"
        nodes = [node for node in definitions.resolve_asset_graph().asset_nodes if node.key.path[0] == word_of(NAME)]
        assert any(NAME in str(node.description) for node in nodes)
        project.edit(NAME, ollama={"system": "简短"})
        with dg.build_sensor_context(instance, sensor_name=sensor.name, repository_def=repository) as context:
            first = sensor.evaluate_tick(context)
        assert "ollama_model is stale" in str(first.skip_message)


def test_a_step_that_fails_is_named(
    project: MiniProject, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(chain, "STEPS", steps("raw_dataset", lambda: ValueError("no")))
    assert finetune(project, monkeypatch, "run", NAME, "--to", "raw_dataset") == 1
    assert f"{NAME}/raw_dataset failed unexpectedly: ValueError: no" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["demo", "客服", "a-b", "Génial", "हिन्दी", "mañana_2", "日本語モデル", "x" * 48])
def test_names_that_are_accepted(name: str):
    assert name_problem(name) is None


@pytest.mark.parametrize("name", ["", "_a", "-a", "1a", "a b", "a.b", "a/b", "a\n", "a\u200bb", "😀", "a$b", "x" * 49])
def test_names_that_are_refused(name: str):
    assert name_problem(name)


def test_names_in_dagster():
    assert word_of("llama3_fintech") == "llama3_fintech"
    assert word_of("客服").startswith("u5ba2_u670d_") and word_of("a-b").startswith("a_b_")
    words = [
        word_of(name) for name in ("客服", "客户", "a-b", "a b", "a_b", "A-b", "é", "e\u0301", "x" * 200, "语" * 48)
    ]
    assert len(set(words)) == len(words)
    assert all(word.isascii() and word.replace("_", "a").isalnum() and len(word) < 80 for word in words)
    assert Path(word_of("客服")).name == word_of("客服")
