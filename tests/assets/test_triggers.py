"""When runs start by themselves, and when they do not: the sensors, on a real instance and real files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import dagster as dg
import pytest

from finetune_assets.assets.automation.sensors import TARGET_TAG
from finetune_assets.definitions import load_definitions
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import BadInput
from resources import dead_runs, webhook
from tests.conftest import MiniProject, rows
from tests.support.history_fixtures import make_chain
from tests.support.servers.webhook_receiver import Receiver


class Sensor:
    """A recipe's retrain sensor, looked at again and again, as the daemon does."""

    def __init__(self, project: MiniProject, instance: dg.DagsterInstance):
        self.project, self.instance = project, instance
        self.cursor: str | None = None
        self.load()

    def load(self) -> None:
        self.repository = load_definitions(self.project).get_repository_def()
        self.definition = self.repository.get_sensor_def("mini_retrain")

    def look(self) -> dg.RunRequest | str:
        """The run that it asks for, or why it does not."""
        context = dg.build_sensor_context(self.instance, cursor=self.cursor, repository_def=self.repository)
        result = self.definition(context)
        assert isinstance(result, dg.SensorResult)
        self.cursor = result.cursor if result.cursor is not None else self.cursor
        if result.run_requests:
            (request,) = result.run_requests
            return request
        assert result.skip_reason and result.skip_reason.skip_message
        return result.skip_reason.skip_message

    def settled(self) -> dg.RunRequest | str:
        """What it says when things have stayed as they are."""
        self.look()
        return self.look()

    def start(self, request: dg.RunRequest, status: dg.DagsterRunStatus) -> dg.DagsterRun:
        """The run that was asked for, as the daemon records it."""
        job = self.repository.get_job("mini_job")
        return self.instance.create_run_for_job(
            job,
            tags={**job.tags, **request.tags},
            status=status,
            asset_selection=frozenset(request.asset_selection or ()),
        )


@pytest.fixture
def sensor(mini: MiniProject) -> Iterator[Sensor]:
    mini.edit(schedule={"on_change": True})
    mini.empty_base()
    with dg.instance_for_test(temp_dir=str(mini.home)) as instance:
        yield Sensor(mini, instance)


def selected(request: dg.RunRequest | str) -> list[str]:
    assert isinstance(request, dg.RunRequest), request
    return [key.path[-1] for key in request.asset_selection or ()]


def test_sensors_are_off_unless_the_recipe_turns_them_on(mini: MiniProject):
    mini.empty_base()
    repository = load_definitions(mini).get_repository_def()
    assert repository.get_sensor_def("mini_retrain").default_status == dg.DefaultSensorStatus.STOPPED
    mini.edit(schedule={"on_change": True, "minimum_interval_seconds": 7})
    turned_on = load_definitions(mini).get_repository_def().get_sensor_def("mini_retrain")
    assert turned_on.default_status == dg.DefaultSensorStatus.RUNNING
    assert turned_on.minimum_interval_seconds == 7
    assert not repository.schedule_defs


def test_what_was_never_made_is_made_once_things_have_settled(sensor: Sensor):
    assert sensor.look() == (
        "raw_dataset is missing: never made; starts a run if the next evaluation finds the same state"
    )
    request = sensor.look()
    assert selected(request)[0] == "raw_dataset" and selected(request)[-1] == "ollama_model"
    assert isinstance(request, dg.RunRequest)
    again = sensor.look()
    assert isinstance(again, dg.RunRequest) and again.run_key == request.run_key, "asked twice, it is one run"


def test_nothing_stale_nothing_run(sensor: Sensor):
    make_chain(sensor.project)
    assert sensor.settled() == "everything is up to date"


def test_a_file_still_being_written_is_not_trained_on(sensor: Sensor):
    make_chain(sensor.project)
    for count in (5, 7, 9):
        sensor.project.write_rows(rows(count))
        assert "starts a run if the next evaluation finds the same state" in str(sensor.look())
    assert selected(sensor.look())[:2] == ["raw_dataset", "dataset_info"]


def test_a_changed_value_runs_what_reads_it_and_no_more(sensor: Sensor):
    make_chain(sensor.project)
    sensor.project.edit(train={"learning_rate": 2e-3})
    assert selected(sensor.settled()) == ["lora_adapter", "eval_metrics", "merged_model", "gguf_file", "ollama_model"]


def test_a_run_of_the_recipe_is_never_overlapped(sensor: Sensor):
    request = sensor.settled()
    assert isinstance(request, dg.RunRequest)
    run = sensor.start(request, dg.DagsterRunStatus.STARTED)
    sensor.instance.add_run_tags(run.run_id, dead_runs.this_process())
    sensor.project.edit(train={"learning_rate": 2e-3})
    assert sensor.settled() == f"run {run.run_id[:8]} of mini is started"
    sensor.instance.report_run_failed(run)
    assert isinstance(sensor.settled(), dg.RunRequest), "what changed meanwhile is not lost"


def test_neither_is_a_partial_run_from_the_ui(sensor: Sensor):
    job = load_definitions(sensor.project).resolve_implicit_global_asset_job_def()
    selection = frozenset({dg.AssetKey(["mini", "raw_dataset"])})
    run = sensor.instance.create_run_for_job(
        job, status=dg.DagsterRunStatus.STARTED, asset_selection=selection, tags=dead_runs.this_process()
    )
    assert sensor.settled() == f"run {run.run_id[:8]} of mini is started"


@pytest.mark.parametrize("outcome", ["failed", "canceled"])
def test_a_failed_input_is_not_tried_again_until_something_changes(sensor: Sensor, outcome: str):
    request = sensor.settled()
    assert isinstance(request, dg.RunRequest)
    run = sensor.start(request, dg.DagsterRunStatus.STARTED)
    report = sensor.instance.report_run_failed if outcome == "failed" else sensor.instance.report_run_canceled
    report(run)
    for _ in range(3):
        assert "change the recipe or its data" in str(sensor.look())
    sensor.project.edit(train={"learning_rate": 2e-3})
    changed = sensor.settled()
    assert isinstance(changed, dg.RunRequest) and changed.tags[TARGET_TAG] != request.tags[TARGET_TAG]
    run = sensor.start(changed, dg.DagsterRunStatus.STARTED)
    sensor.instance.report_run_failed(run)
    sensor.project.edit(train={"learning_rate": 1e-3})
    assert isinstance(sensor.settled(), dg.RunRequest), "going back to what failed before is a change, too"


def test_there_and_back_again_is_two_runs(sensor: Sensor):
    """The same target twice, with another one between: Dagster must not take the second for the first."""
    keys = []
    for rate in (1e-3, 2e-3, 1e-3, 2e-3):
        sensor.project.edit(train={"learning_rate": rate})
        request = sensor.settled()
        assert isinstance(request, dg.RunRequest), (rate, request)
        keys.append(request.run_key)
        run = sensor.start(request, dg.DagsterRunStatus.STARTED)
        make_chain(sensor.project)
        sensor.instance.report_dagster_event(
            dg.DagsterEvent("PIPELINE_SUCCESS", run.job_name, message="done"), run_id=run.run_id
        )
        assert sensor.settled() == "everything is up to date"
    assert len(set(keys)) == 4


def test_a_run_whose_process_was_killed_blocks_nobody(sensor: Sensor):
    request = sensor.settled()
    assert isinstance(request, dg.RunRequest)
    run = sensor.start(request, dg.DagsterRunStatus.STARTED)
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    host, _, began = dead_runs.this_process()[dead_runs.PROCESS_TAG].split(":")
    began = str(dead_runs._began(child.pid))
    sensor.instance.add_run_tags(run.run_id, {dead_runs.PROCESS_TAG: f"{host}:{child.pid}:{began}"})
    sensor.instance.event_log_storage.set_concurrency_slots("gpu", 1)
    sensor.instance.event_log_storage.claim_concurrency_slot("gpu", run.run_id, "mini__lora_adapter")
    assert "is started" in str(sensor.look())
    child.kill()
    child.wait()
    assert "change the recipe or its data" in str(sensor.settled())
    ended = sensor.instance.get_run_by_id(run.run_id)
    assert ended and ended.status == dg.DagsterRunStatus.FAILURE
    assert not sensor.instance.event_log_storage.get_concurrency_info("gpu").claimed_slots


def test_a_living_run_keeps_its_slot_and_so_does_one_of_another_machine(sensor: Sensor):
    storage = sensor.instance.event_log_storage
    storage.set_concurrency_slots("gpu", 2)
    job = sensor.repository.get_job("mini_job")
    host, pid, began = dead_runs.this_process()[dead_runs.PROCESS_TAG].split(":")
    for number, tag in enumerate((f"{host}:{pid}:{began}", f"elsewhere:{2**22 - 3}:1")):
        run = sensor.instance.create_run_for_job(
            job, status=dg.DagsterRunStatus.STARTED, tags={dead_runs.PROCESS_TAG: tag}
        )
        storage.claim_concurrency_slot("gpu", run.run_id, f"step_{number}")
    assert dead_runs.end_dead_runs(sensor.instance) == []
    assert len(storage.get_concurrency_info("gpu").claimed_slots) == 2


def test_a_recipe_broken_meanwhile_says_so_and_the_others_go_on(sensor: Sensor):
    sensor.project.copy_recipe("second")
    sensor.load()
    sensor.project.recipe_path().write_text("dataset: {dataset: [facts], tset_size: 1}")
    with pytest.raises(BadInput, match=r"mini.yaml:1: dataset.tset_size: unknown key; did you mean 'test_size'"):
        sensor.look()
    sensor.definition = sensor.repository.get_sensor_def("second_retrain")
    assert isinstance(sensor.settled(), dg.RunRequest)
    observe = sensor.repository.get_sensor_def("observe")
    told = observe(dg.build_sensor_context(sensor.instance, repository_def=sensor.repository))
    assert isinstance(told, dg.SensorResult) and told.skip_reason
    assert {event.asset_key.path[0] for event in told.asset_events} == {"second", "datasets"}
    assert "mini.yaml:1: dataset.tset_size" in str(told.skip_reason.skip_message)


def test_turning_it_off_in_the_recipe_needs_no_reload(sensor: Sensor):
    sensor.project.edit(schedule={"on_change": False})
    assert sensor.settled() == "schedule.on_change of mini is off"


def test_the_schedule_skips_when_there_is_nothing_to_do_and_tries_failures_again(sensor: Sensor):
    sensor.project.edit(schedule={"cron": "0 3 * * *", "execution_timezone": "Asia/Shanghai"})
    sensor.load()
    schedule = sensor.repository.get_schedule_def("mini_schedule")
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("0 3 * * *", "Asia/Shanghai")
    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING

    def tick() -> list[dg.RunRequest]:
        with dg.build_schedule_context(sensor.instance, repository_def=sensor.repository) as context:
            return list(schedule.evaluate_tick(context).run_requests or ())

    (request,) = tick()
    sensor.instance.report_run_failed(sensor.start(request, dg.DagsterRunStatus.STARTED))
    assert len(tick()) == 1
    make_chain(sensor.project)
    assert tick() == []


@pytest.mark.parametrize(
    "wrong",
    [{"cron": "every day"}, {"cron": "61 3 * * *"}, {"cron": "0 3 * * *", "execution_timezone": "Mars/Olympus"}],
)
def test_a_schedule_that_cannot_be_is_one_broken_recipe(mini: MiniProject, wrong: dict[str, str]):
    mini.copy_recipe("second")
    mini.edit(schedule=wrong)
    graph = load_definitions(mini).resolve_asset_graph()
    (value,) = [value for key, value in wrong.items() if value != "0 3 * * *"]
    assert value in str(graph.get(dg.AssetKey(["mini", "recipe"])).description)
    assert graph.has(dg.AssetKey(["second", "lora_adapter"]))


def failed_run(project: Project, instance: dg.DagsterInstance) -> dg.RunFailureSensorContext:
    """A real failed run of raw_dataset: its data file is gone."""
    definitions = load_definitions(project)
    (project.root / "data" / "facts.json").unlink()
    result = definitions.resolve_job_def("mini_job").execute_in_process(
        instance=instance, asset_selection=[dg.AssetKey(["mini", "raw_dataset"])], raise_on_error=False
    )
    assert not result.success
    return dg.build_run_status_sensor_context(
        "failure_webhook", result.get_run_failure_event(), instance, result.dagster_run
    ).for_run_failure()


def test_a_failed_run_is_posted_to_the_webhook(sensor: Sensor, monkeypatch: pytest.MonkeyPatch):
    receiver = Receiver()
    context = failed_run(sensor.project, sensor.instance)
    tell = sensor.repository.get_sensor_def("failure_webhook")
    skipped = tell(context, webhook=webhook.WebhookResource())
    assert isinstance(skipped, dg.SkipReason) and receiver.posted == []
    monkeypatch.setenv(webhook.VARIABLE, receiver.address)
    assert tell(context, webhook=webhook.WebhookResource(ui="http://ui")) is None
    (body,) = receiver.posted
    assert body["recipe"] == "mini" and body["asset"] == "mini/raw_dataset"
    assert "no such file" in body["text"] and f"http://ui/runs/{body['run_id']}" in body["text"]


def test_a_webhook_that_fails_does_not_tell_its_address(sensor: Sensor, monkeypatch: pytest.MonkeyPatch):
    receiver = Receiver(status=500)
    context = failed_run(sensor.project, sensor.instance)
    tell = sensor.repository.get_sensor_def("failure_webhook")
    for address in (receiver.address, "http://127.0.0.1:9/secret-token", "secret-token"):
        monkeypatch.setenv(webhook.VARIABLE, address)
        with pytest.raises(Exception) as caught:
            tell(context, webhook=webhook.WebhookResource())
        assert "could not be posted" in str(caught.value) and "secret" not in str(caught.value)
