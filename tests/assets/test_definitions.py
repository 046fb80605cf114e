"""What Dagster sees: every recipe a group with its assets and its job; nothing heavy is loaded to list it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta

import dagster as dg
import pytest

from finetune_assets.assets.keys import word_of
from finetune_assets.definitions import load_definitions
from finetune_assets.lineage.graph import NODES
from finetune_assets.recipe.project import Project
from tests.conftest import REPOSITORY, MiniProject


def test_the_lineage_is_the_one_of_the_graph(mini: MiniProject):
    graph = load_definitions(mini).resolve_asset_graph()
    for node in NODES.values():
        found = graph.get(dg.AssetKey(["mini", node.name]))
        sources = {f"mini/{node.name}_config", *(["datasets/facts"] if node.name == "raw_dataset" else [])}
        upstreams = {f"mini/{up.asset}" for up in node.upstreams}
        assert {key.to_user_string() for key in found.parent_keys} == sources | upstreams
        assert found.group_name == "mini"
        assert found.description and found.owners and found.kinds
        assert found.tags["recipe"] == "mini"
        (reference,) = found.metadata["dagster/code_references"].value.code_references
        assert reference.file_path.endswith(f"assets/{node.name}.py") and reference.line_number
        assert found.code_version == node.code_version


def test_each_description_has_the_recipe_values_with_defaults_marked(mini: MiniProject):
    graph = load_definitions(mini).resolve_asset_graph()
    for name in ("lora_adapter", "lora_adapter_config"):
        description = str(graph.get(dg.AssetKey(["mini", name])).description)
        assert "| train.learning_rate | `0.001` |" in description
        assert "| train.lora_rank | *8 (default)* |" in description


def test_owners_are_those_of_the_project(mini: MiniProject):
    (mini.root / "pyproject.toml").write_text('[tool.finetune-assets]\nowners = ["team:chat", "ana@example.com"]')
    graph = load_definitions(mini).resolve_asset_graph()
    assert {tuple(sorted(node.owners)) for node in graph.asset_nodes} == {("ana@example.com", "team:chat")}


def test_rows_have_a_schema(mini: MiniProject):
    metadata = load_definitions(mini).resolve_asset_graph().get(dg.AssetKey(["mini", "dataset_info"])).metadata
    assert [column.name for column in metadata["dagster/column_schema"].columns] == ["id", "dataset", "messages"]


@pytest.mark.parametrize(("cron", "hours"), [("0 3 * * *", 24), ("0 3 * * 1-5", 72), ("0 0 1 * *", 31 * 24)])
def test_a_schedule_says_how_fresh_what_is_served_has_to_be(mini: MiniProject, cron: str, hours: int):
    def policy() -> dg.FreshnessPolicy | None:
        graph = load_definitions(mini).resolve_asset_graph()
        assert graph.get(dg.AssetKey(["mini", "gguf_file"])).freshness_policy is None
        return graph.get(dg.AssetKey(["mini", "ollama_model"])).freshness_policy

    assert policy() is None
    mini.edit(schedule={"cron": cron})
    expected = timedelta(hours=hours)
    assert policy() == dg.FreshnessPolicy.time_window(
        fail_window=2 * expected + timedelta(hours=1), warn_window=expected + timedelta(hours=1)
    )


def test_data_files_and_recipe_values_are_observable_nodes(mini: MiniProject):
    graph = load_definitions(mini).resolve_asset_graph()
    values = [f"mini/{name}_config" for name in NODES]
    assert {key.to_user_string() for key in graph.observable_asset_keys} == {*values, "datasets/facts"}
    assert {graph.get(dg.AssetKey(name.split("/"))).group_name for name in values} == {"mini_config"}
    assert not any(graph.get(key).is_materializable for key in graph.observable_asset_keys)


def test_two_recipes_share_the_node_of_a_data_set_and_nothing_else(mini: MiniProject):
    mini.copy_recipe("second")
    graph = load_definitions(mini).resolve_asset_graph()
    readers = {key.to_user_string() for key in graph.get(dg.AssetKey(["datasets", "facts"])).child_keys}
    assert readers == {"mini/raw_dataset", "second/raw_dataset"}
    for recipe, other in (("mini", "second"), ("second", "mini")):
        nodes = [graph.get(dg.AssetKey([recipe, name])) for name in NODES]
        assert not any(parent.path[0] == other for node in nodes for parent in node.parent_keys)


def test_names_that_dagster_cannot_take_still_have_nodes_of_their_own(mini: MiniProject):
    entry = {"file_name": "facts.json"}
    names = ["客服", "客户", "a-b", "a b", "a/b"]
    (mini.root / "data" / "dataset_info.json").write_text(json.dumps(dict.fromkeys(names, entry)))
    mini.edit(dataset={"dataset": names})
    graph = load_definitions(mini).resolve_asset_graph()
    assert sum(key.path[0] == "datasets" for key in graph.observable_asset_keys) == len(names)


def test_no_recipe_can_take_the_name_of_the_data_sets_group(mini: MiniProject):
    mini.recipe_path("datasets").write_text(mini.recipe_path().read_text())
    graph = load_definitions(mini).resolve_asset_graph()
    assert "is reserved for the group of the data sets" in str(
        graph.get(dg.AssetKey(["datasets", "recipe"])).description
    )


def test_every_recipe_of_this_repository_has_a_job():
    definitions = load_definitions(Project.find(REPOSITORY))
    assert {job.name for job in definitions.resolve_all_job_defs()} >= {"demo_job", "llama3_fintech_job"}


def test_a_broken_recipe_says_why_and_does_not_hide_the_others(mini: MiniProject):
    mini.recipe_path("broken one").write_text("dataset: {}")
    definitions = load_definitions(mini)
    graph = definitions.resolve_asset_graph()
    broken = graph.get(dg.AssetKey([word_of("broken one"), "recipe"]))
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


def test_two_recipes_that_would_serve_under_one_name_are_refused(mini: MiniProject):
    mini.copy_recipe("second")
    mini.copy_recipe("third")
    mini.edit("third", ollama={"name": "MINI"})  # a server takes them for one
    graph = load_definitions(mini).resolve_asset_graph()
    assert graph.has(dg.AssetKey(["second", "lora_adapter"]))
    for name, served, rival in (("mini", "mini", "third"), ("third", "MINI", "mini")):
        description = str(graph.get(dg.AssetKey([name, "recipe"])).description)
        assert f"ollama.name {served!r} of {name} is also the name in {rival}" in description
