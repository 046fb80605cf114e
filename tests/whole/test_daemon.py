"""The sensors at work under a real daemon, on a real (tiny) model: edits are seen, runs start, broken recipes wait."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster import DagsterInstance, DagsterRun

from docs.screenshots import webserver
from resources import webhook
from tests.conftest import REPOSITORY, MiniProject, make_mini, rows, shared_cache
from tests.support.dagster_internals import InstigatorTick
from tests.support.history_fixtures import plan_of
from tests.support.hostile.recipes import KINDS, put
from tests.support.servers.webhook_receiver import Receiver

WAIT = 240.0  # seconds; a tick comes every few seconds, a tiny chain takes half a minute


class Daemon:
    """A project under `dagster dev`."""

    def __init__(self, project: MiniProject, instance: DagsterInstance):
        self.project, self.instance = project, instance

    def runs(self, recipe: str = "mini") -> list[DagsterRun]:
        """Runs of a recipe, the first one first."""
        found = self.instance.get_runs(dg.RunsFilter(tags={"recipe": recipe}))
        return list(reversed(found))

    def ticks(self, sensor: str) -> list[InstigatorTick]:
        (state,) = [state for state in self.instance.all_instigator_state() if state.name == sensor] or (None,)
        if state is None:
            return []
        return list(self.instance.get_ticks(state.instigator_origin_id, state.selector_id, limit=10))


def wait_for(what: str, happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(1)


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Receiver:
    """What failed runs are posted to."""
    receiver = Receiver()
    monkeypatch.setenv(webhook.VARIABLE, receiver.address)
    return receiver


def no_neighbours(project: MiniProject) -> None:
    """The recipe is alone."""


def hostile_neighbours(project: MiniProject) -> None:
    """Beside the recipe lie bad ones of every kind."""
    for kind in KINDS:
        put(project.configs, kind)


@pytest.fixture
def daemon(tmp_path: Path, tiny_base: Path, receiver: Receiver, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    project = make_mini(tmp_path, base=tiny_base)
    getattr(request, "param", no_neighbours)(project)
    project.cache.mkdir(parents=True)
    (project.cache / "wheels").symlink_to(shared_cache() / "wheels")
    shutil.copyfile(REPOSITORY / "dagster_home" / "dagster.yaml", project.home / "dagster.yaml")
    project.edit(schedule={"on_change": True, "minimum_interval_seconds": 1})
    with webserver(project.root, project.home), DagsterInstance.from_config(str(project.home)) as instance:
        yield Daemon(project, instance)


def test_a_recipe_is_kept_up_to_date(daemon: Daemon, receiver: Receiver):
    project = daemon.project

    def finished(count: int) -> bool:
        runs = daemon.runs()
        assert len(runs) <= count, "a run too many"
        return len(runs) == count and runs[-1].is_finished

    def steps_of_last_run() -> list[str]:
        stats = daemon.instance.get_run_step_stats(daemon.runs()[-1].run_id)
        return [item.step_key.removeprefix("mini__") for item in stats]

    def fresh() -> bool:
        return {item.state for item in plan_of(project).values()} == {"fresh"}

    wait_for("the sensor makes what was never made", lambda: finished(1))
    assert daemon.runs()[0].is_success and fresh()
    adapter = plan_of(project)["lora_adapter"].wanted

    recipe = project.recipe_path().read_text()
    project.recipe_path().write_text(recipe.replace("cutoff_len", "cutof_len"))
    wait_for(
        "the tick of a broken recipe fails and says why",
        lambda: any(tick.error and "cutof_len" in tick.error.to_string() for tick in daemon.ticks("mini_retrain")),
    )
    project.recipe_path().write_text(recipe)
    project.edit(ollama={"system": "Be brief."})
    wait_for("mended, the recipe runs again", lambda: finished(2))
    assert daemon.runs()[1].is_success and fresh()
    assert steps_of_last_run() == ["ollama_model"]

    project.write_rows([*rows(), {"instruction": "x", "output": ""}])
    wait_for("a row that cannot be used fails the run", lambda: finished(3))
    assert daemon.runs()[2].status == dg.DagsterRunStatus.FAILURE
    seen = len(daemon.ticks("mini_retrain"))
    wait_for(
        "the sensor goes on looking",
        lambda: "change the recipe or its data" in str(daemon.ticks("mini_retrain")[0].skip_reason) and seen,
    )
    time.sleep(5)
    assert finished(3), "a failed input is not tried again"
    wait_for("the failure is posted to the webhook", lambda: receiver.posted)
    (posted,) = receiver.posted
    assert (posted["asset"], posted["run_id"]) == ("mini/dataset_info", daemon.runs()[2].run_id)
    assert "the row has no answer" in posted["text"]

    project.write_rows(list(reversed(rows())), indent=2)
    wait_for("changed, it is tried again", lambda: finished(4))
    assert daemon.runs()[3].is_success and fresh()
    assert steps_of_last_run()[:2] == ["raw_dataset", "dataset_info"]
    assert plan_of(project)["lora_adapter"].wanted == adapter, "the same rows: nothing was trained"


@pytest.mark.parametrize("daemon", [hostile_neighbours], indirect=True)
def test_bad_recipes_beside_a_good_one(daemon: Daemon):
    project = daemon.project
    wait_for("the good recipe's sensor starts a run", lambda: daemon.runs() and daemon.runs()[-1].is_finished)
    assert daemon.runs()[0].is_success
    assert {item.state for item in plan_of(project).values()} == {"fresh"}

    def told() -> str:
        return "".join(str(tick.skip_reason) for tick in daemon.ticks("observe"))

    wait_for("the observing sensor names every bad one", lambda: all(f"{kind}.yaml" in told() for kind in KINDS))
    assert not [tick.error for tick in daemon.ticks("observe") if tick.error]
    assert not [tick.error for tick in daemon.ticks("mini_retrain") if tick.error]
    project.edit(ollama={"system": "Be brief."})
    wait_for("an edit of the good one is seen", lambda: len(daemon.runs()) == 2 and daemon.runs()[-1].is_finished)
    assert daemon.runs()[1].is_success
