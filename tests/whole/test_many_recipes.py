"""Fifty recipes on one data set: all load, plan and run, share no names by accident, and leave each other alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import dagster as dg
import pytest
import yaml

from finetune_assets.definitions import load_definitions
from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.planned import Planned
from tests.conftest import MiniProject, make_mini, rows
from tests.support.history_fixtures import make_chain, plan_of

NAMES = [f"recipe_{number:02d}" for number in range(50)]


@pytest.fixture(scope="module")
def fifty(tmp_path_factory: pytest.TempPathFactory) -> MiniProject:
    """Fifty recipes that read one data set and one base model, each with a chain of stand-ins; all are up to date."""
    project = make_mini(tmp_path_factory.mktemp("fifty"))
    content = yaml.safe_load(project.recipe_path().read_text())
    project.recipe_path().unlink()
    for name in NAMES:
        project.recipe_path(name).write_text(yaml.safe_dump({**content, "ollama": {"name": name}}))
        make_chain(project, name)
    return project


def states(project: MiniProject) -> dict[str, dict[str, str]]:
    """Asset -> state of every recipe that is not all fresh."""
    plans: dict[str, Mapping[str, Planned]] = {name: plan_of(project, name) for name in NAMES}
    found = {name: {asset: item.state for asset, item in plan.items()} for name, plan in plans.items()}
    return {name: plan for name, plan in found.items() if set(plan.values()) != {"fresh"}}


def files(project: MiniProject, name: str) -> dict[Path, tuple[int, int]]:
    """Every file of a recipe's artifacts, with its inode and the time of its last change."""
    found = [path for path in (project.store / name).rglob("*") if path.is_file()]
    return {path: ((seen := path.stat()).st_ino, seen.st_mtime_ns) for path in found if path.name != ".lock"}


def test_all_load_with_their_assets_and_jobs_and_no_edge_between_them(fifty: MiniProject):
    definitions = load_definitions(fifty)
    graph = definitions.resolve_asset_graph()
    for name in NAMES:
        assets = {dg.AssetKey([name, asset]) for asset in NODES}
        assert {key for key in graph.materializable_asset_keys if graph.get(key).group_name == name} == assets
        parents = {parent for asset in assets for parent in graph.get(asset).parent_keys}
        assert {parent.path[0] for parent in parents} == {name, "datasets"}
    assert len(graph.materializable_asset_keys) == len(NAMES) * len(NODES)
    jobs = [job.name for job in definitions.resolve_all_job_defs()]
    assert len(jobs) == len(set(jobs)) and {f"{name}_job" for name in NAMES} <= set(jobs)
    triggers = [trigger.name for trigger in (*(definitions.sensors or []), *(definitions.schedules or []))]
    assert len(triggers) == len(set(triggers))


def test_each_has_artifacts_and_a_served_model_of_its_own(fifty: MiniProject):
    assert states(fifty) == {}
    found = [item.artifact for name in NAMES for item in plan_of(fifty, name).values()]
    assert len({artifact.path for artifact in found if artifact is not None}) == len(NAMES) * len(NODES)
    served = [plan_of(fifty, name)["ollama_model"].artifact for name in NAMES]
    assert {artifact.metrics["name"] for artifact in served if artifact is not None} == set(NAMES)


def test_a_change_of_one_concerns_that_one_only(fifty: MiniProject):
    first, *others = NAMES
    before = {name: files(fifty, name) for name in others}
    fifty.edit(first, train={"learning_rate": 0.5}, ollama={"system": "Be brief."})
    assert list(states(fifty)) == [first]
    make_chain(fifty, first)
    assert states(fifty) == {}
    assert {name: files(fifty, name) for name in others} == before
    fifty.edit(first, train={"learning_rate": 1e-3}, ollama={"system": None})
    make_chain(fifty, first)
    assert states(fifty) == {}


def test_a_change_of_the_data_concerns_all_and_each_takes_it_in_for_itself(fifty: MiniProject):
    data = fifty.root / "data" / "facts.json"
    before, kept = data.read_bytes(), data.stat()
    fifty.write_rows(rows(10))
    stale = states(fifty)
    assert list(stale) == NAMES and {plan["raw_dataset"] for plan in stale.values()} == {"stale"}
    make_chain(fifty, NAMES[7])
    assert list(states(fifty)) == [name for name in NAMES if name != NAMES[7]]
    data.write_bytes(before)
    os.utime(data, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    make_chain(fifty, NAMES[7])
    assert states(fifty) == {}


def test_a_broken_one_does_not_hide_the_others(fifty: MiniProject):
    path = fifty.recipe_path(NAMES[3])
    text = path.read_text()
    path.write_text("dataset: [")
    graph = load_definitions(fifty).resolve_asset_graph()
    path.write_text(text)
    found = {key.path[0] for key in graph.materializable_asset_keys if key.path[-1] == "ollama_model"}
    assert found == set(NAMES) - {NAMES[3]}
    assert "cannot be read" in str(graph.get(dg.AssetKey([NAMES[3], "recipe"])).description)
