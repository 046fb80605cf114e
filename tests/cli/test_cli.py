"""The command line: bad input is one message with the right exit code, and nothing heavy is loaded to say it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from finetune_assets.cli.live import LiveRun
from finetune_assets.cli.results import headline
from finetune_assets.lineage.graph import NODES
from finetune_assets.reporting.events import Begin, Done
from tests.conftest import REPOSITORY, MiniProject


def finetune(project: MiniProject | None, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {"FINETUNE_PROJECT": str(project.root), "DAGSTER_HOME": str(project.home)} if project else {}
    return subprocess.run(
        [sys.executable, "-m", "finetune_assets.cli", *arguments],
        env={**os.environ, **own, "PYTHONPATH": str(REPOSITORY), **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "min"), "unknown recipe 'min'; did you mean 'mini'?"),
        (("run", "nowhere/x.yaml"), "nowhere/x.yaml: no such recipe file"),
        (("run", "mini", "--to", "lora_adaptor"), "unknown asset 'lora_adaptor'; did you mean 'lora_adapter'?"),
        (("run", "mini"), "base model not found: there is no folder"),
        (("chat", "mini", "--with", "olama"), "unknown stage 'olama'; did you mean 'ollama'?"),
        (("chat", "mini", "--with", "gguf"), "mini/gguf_file has not been made yet"),
        (("runn", "mini"), "No such command"),
        (("plan",), "Missing argument"),
    ],
)
def test_bad_input_is_one_message(mini: MiniProject, arguments: tuple[str, ...], words: str):
    if "base" not in words:
        mini.empty_base()
    done = finetune(mini, *arguments)
    assert words in done.stderr
    assert done.returncode == (1 if "not been made" in words else 2)
    assert "Traceback" not in done.stderr
    assert not done.stdout
    assert not (mini.store.exists() and list(mini.store.rglob("manifest.json")))


def test_debug_shows_the_traceback(mini: MiniProject):
    done = finetune(mini, "plan", "min", "--debug")
    assert "Traceback" in done.stderr and "unknown recipe" in done.stderr


def test_the_plan_for_programs(mini: MiniProject):
    mini.empty_base()
    done = finetune(mini, "plan", "mini", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert [item["asset"] for item in plan] == list(NODES)
    assert all(set(item) == {"asset", "state", "reasons", "seconds", "bytes"} for item in plan)
    assert plan[0]["seconds"] is None and plan[0]["bytes"] == (mini.root / "data" / "facts.json").stat().st_size
    assert {item["state"] for item in plan} == {"missing"}


def test_the_demo_and_the_real_world_recipe_plan_on_any_machine(tmp_path):
    for recipe in ("demo", "llama3_fintech"):
        done = finetune(None, "plan", recipe, "--json", DAGSTER_HOME=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)) == len(NODES)


def test_a_recipe_may_be_given_by_its_path(mini: MiniProject, tmp_path):
    mini.empty_base()
    elsewhere = tmp_path / "other.yaml"
    elsewhere.write_text(mini.recipe_path().read_text())
    done = finetune(mini, "plan", str(elsewhere))
    assert done.returncode == 0, done.stderr
    assert "other" in done.stdout


def test_a_recipe_elsewhere_cannot_take_the_place_of_the_projects_own(mini: MiniProject, tmp_path):
    elsewhere = tmp_path / "mini.yaml"
    elsewhere.write_text(mini.recipe_path().read_text())
    done = finetune(mini, "plan", str(elsewhere))
    assert done.returncode == 2
    assert "would replace those of" in done.stderr


def test_planning_loads_neither_torch_nor_dagster(mini: MiniProject):
    mini.empty_base()
    script = (
        "import sys; sys.argv = ['finetune', 'plan', 'mini']\n"
        "import finetune_assets.cli as cli\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'dagster', 'transformers', 'datasets', 'pandas', 'numpy', 'ollama'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "FINETUNE_PROJECT": str(mini.root), "DAGSTER_HOME": str(mini.home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("made", "reused", "words"),
    [
        (0, 0, "everything is up to date"),
        (3, 0, "3 assets materialised in 8.0 s"),
        (1, 2, "1 asset materialised in 8.0 s, 2 already up to date"),
        (0, 1, "0 assets materialised in 8.0 s, 1 already up to date"),
    ],
)
def test_what_was_reused_does_not_count_as_made(made: int, reused: int, words: str):
    assert headline(made, reused, 8.0) == words


def test_a_run_knows_what_it_made():
    """What the display is told: two assets were to be made, and one of them turned out to be there."""
    with LiveRun(["raw_dataset", "dataset_info", "base_model"], ["raw_dataset", "dataset_info"]) as live:
        for asset, reused in (("raw_dataset", False), ("dataset_info", True)):
            live.event(asset, Begin())
            live.event(asset, Done(reused=reused))
    assert live.reused == ["dataset_info"]


def test_outside_of_any_project(tmp_path):
    done = finetune(None, "plan", "demo", FINETUNE_PROJECT=str(tmp_path))
    assert done.returncode == 2
    assert "no project found" in done.stderr
