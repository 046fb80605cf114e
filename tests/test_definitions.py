"""What Dagster sees: every recipe a group with its assets and its job; nothing heavy is loaded to list it."""

from __future__ import annotations

import os
import subprocess
import sys

import dagster as dg

from finetune_assets.definitions import load_definitions
from finetune_assets.lineage import NODES
from finetune_assets.project import Project
from tests.conftest import REPOSITORY, MiniProject


def test_the_lineage_is_the_one_of_the_graph(mini: MiniProject):
    graph = load_definitions(mini).resolve_asset_graph()
    for node in NODES.values():
        found = graph.get(dg.AssetKey(["mini", node.name]))
        assert {key.path[-1] for key in found.parent_keys} == {up.asset for up in node.upstreams}
        assert found.group_name == "mini"
        assert found.description and found.owners and found.kinds
        assert found.code_version == node.code_version


def test_every_recipe_of_this_repository_has_a_job():
    definitions = load_definitions(Project.find(REPOSITORY))
    assert {job.name for job in definitions.resolve_all_job_defs()} >= {"demo_job", "llama3_fintech_job"}


def test_a_broken_recipe_says_why_and_does_not_hide_the_others(mini: MiniProject):
    mini.recipe_path("broken-one").write_text("dataset: {}")
    definitions = load_definitions(mini)
    graph = definitions.resolve_asset_graph()
    broken = graph.get(dg.AssetKey(["broken_one", "recipe"]))
    assert "dataset.dataset: missing" in (broken.description or "")
    assert graph.has(dg.AssetKey(["mini", "lora_adapter"]))


def test_a_schedule_runs_from_the_start_and_only_when_asked_for(mini: MiniProject):
    assert not list(load_definitions(mini).schedules or [])
    mini.edit(schedule={"cron": "0 3 * * *", "execution_timezone": "Asia/Shanghai"})
    (schedule,) = load_definitions(mini).schedules or []
    assert isinstance(schedule, dg.ScheduleDefinition)
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("0 3 * * *", "Asia/Shanghai")
    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING


def test_dagster_validates_the_definitions_and_loads_no_torch(tmp_path):
    environment = {**os.environ, "DAGSTER_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "dagster", "definitions", "validate", "-m", "finetune_assets.definitions"],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    script = (
        "import sys, finetune_assets.definitions; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], env=environment, cwd=REPOSITORY).returncode == 0
