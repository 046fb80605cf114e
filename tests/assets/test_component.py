"""The component in a Dagster project other than this one: its own folder, its own DAGSTER_HOME, its own store."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import dagster as dg
import pytest
import yaml

from finetune_assets.export.parity.checks.structure import EXACT
from finetune_assets.lineage.graph import NODES
from resources.gpu import GpuResource
from tests.conftest import REPOSITORY, rows, shared_cache

DG = str(Path(sys.executable).with_name("dg"))
PYPROJECT = """
[project]
name = "shop"
version = "0.1.0"

[tool.dg]
directory_type = "project"

[tool.dg.project]
root_module = "shop"
"""
DEFINITIONS = """
from pathlib import Path
import dagster as dg

@dg.definitions
def defs():
    return dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
"""
RECIPE = {
    "dataset": {"dataset": ["facts"], "test_size": 2},
    "model": {"model_name_or_path": "./base"},
    "train": {"max_steps": 2, "per_device_train_batch_size": 4, "cutoff_len": 128},
    "evaluate": {"max_new_tokens": 4},
    "ollama": {"name": "bot"},
}
DEFS_YAML = f"""\
type: finetune_assets.FinetuneRecipe
attributes:
  recipe: {json.dumps(RECIPE)}
  key_prefix: ml/chat
  group_name: support_bot
  owners: [team:support, ana@example.com]
  tags: {{ tier: prod }}
  device: cpu
"""


@dataclass(frozen=True)
class Shop:
    """A Dagster project that knows nothing of this one but the component."""

    root: Path

    @property
    def home(self) -> Path:
        return self.root / "state"

    def mount(self, name: str, text: str) -> Path:
        """Write src/shop/defs/NAME/defs.yaml; its folder."""
        folder = self.root / "src" / "shop" / "defs" / name
        folder.mkdir(parents=True)
        (folder / "defs.yaml").write_text(text)
        return folder

    def load(self, monkeypatch: pytest.MonkeyPatch) -> dg.Definitions:
        monkeypatch.syspath_prepend(str(self.root / "src"))
        monkeypatch.setenv("DAGSTER_HOME", str(self.home))
        monkeypatch.delenv("FINETUNE_PROJECT", raising=False)
        for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
            del sys.modules[name]
        return importlib.import_module("shop.definitions").defs()

    def dg(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "FINETUNE_PROJECT"}
        paths = {"PYTHONPATH": os.pathsep.join([str(self.root / "src"), str(REPOSITORY)])}
        return subprocess.run(
            [DG, *arguments],
            env={**environment, **paths, "DAGSTER_HOME": str(self.home)},
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=120,
        )


def make_shop(root: Path) -> Shop:
    package = root / "src" / "shop"
    (package / "defs").mkdir(parents=True)
    for module in ("__init__.py", "defs/__init__.py"):
        (package / module).touch()
    (root / "pyproject.toml").write_text(PYPROJECT)
    (package / "definitions.py").write_text(DEFINITIONS)
    for folder in ("data", "base", "state"):
        (root / folder).mkdir()
    (root / "base" / "config.json").write_text("{}")
    (root / "data" / "facts.json").write_text(json.dumps(rows()))
    (root / "data" / "dataset_info.json").write_text(json.dumps({"facts": {"file_name": "facts.json"}}))
    return Shop(root)


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return make_shop(tmp_path)


def test_eight_lines_mount_a_chain(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    assert len(DEFS_YAML.splitlines()) == 8
    shop.mount("bot", DEFS_YAML)
    definitions = shop.load(monkeypatch)
    graph = definitions.resolve_asset_graph()
    assert {key.to_user_string() for key in graph.materializable_asset_keys} == {
        f"ml/chat/bot/{name}" for name in NODES
    }
    values = {f"ml/chat/bot/{name}_config" for name in NODES}
    assert {key.to_user_string() for key in graph.observable_asset_keys} == {*values, "ml/chat/bot/datasets/facts"}
    for node in graph.asset_nodes:
        assert set(node.owners) == {"team:support", "ana@example.com"}
        assert node.tags["tier"] == "prod"
        assert all(parent.path[:3] == ["ml", "chat", "bot"] for parent in node.parent_keys)
    groups = {node.group_name for node in graph.asset_nodes if node.is_materializable}
    assert groups == {"support_bot"}
    resource = (definitions.resources or {})["ml_chat_bot_gpu"]
    assert isinstance(resource, GpuResource) and resource.device == "cpu"


def test_sensors_and_schedules_come_along_under_names_of_their_own(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    scheduled = {**RECIPE, "schedule": {"on_change": True, "cron": "0 3 * * *", "execution_timezone": "Asia/Shanghai"}}
    shop.mount("bot", attributes(recipe=scheduled, key_prefix=["ml", "chat"]))
    shop.mount("plain", attributes(recipe={**RECIPE, "ollama": {"name": "plain"}}))
    repository = shop.load(monkeypatch).get_repository_def()
    assert {sensor.name for sensor in repository.sensor_defs} == {
        *("ml_chat_bot_observe", "ml_chat_bot_retrain"),
        *("plain_observe", "plain_retrain"),
    }
    assert repository.get_sensor_def("ml_chat_bot_retrain").default_status == dg.DefaultSensorStatus.RUNNING
    (schedule,) = repository.schedule_defs
    assert (schedule.name, schedule.execution_timezone) == ("ml_chat_bot_schedule", "Asia/Shanghai")
    assert {job.name for job in repository.get_all_jobs()} >= {"ml_chat_bot_job", "plain_job"}


def test_a_recipe_can_be_a_file_and_is_read_again_by_the_sensor(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    folder = shop.mount("bot", attributes(recipe="tone.yaml", name="polite", home="models"))
    (folder / "tone.yaml").write_text(yaml.safe_dump(RECIPE))
    definitions = shop.load(monkeypatch)
    assert definitions.resolve_asset_graph().has(dg.AssetKey(["polite", "gguf_file"]))
    sensor = definitions.get_repository_def().get_sensor_def("polite_observe")
    with dg.DagsterInstance.ephemeral() as instance:
        assert observed(sensor, instance) == {f"polite/{name}_config" for name in NODES} | {"polite/datasets/facts"}
        (folder / "tone.yaml").write_text(yaml.safe_dump({**RECIPE, "evaluate": {"max_new_tokens": 9}}))
        assert observed(sensor, instance) == {"polite/eval_metrics_config"}
    assert (shop.root / "models" / "cache").is_dir(), "what a project is not told to keep elsewhere is under `home`"


@pytest.mark.parametrize(
    ("mounted", "message"),
    [
        ({"recipe": {**RECIPE, "train": {"lora_rnk": 4}}}, "recipe: train.lora_rnk: unknown key; did you mean"),
        ({"recipe": 5}, "recipe"),
        ({"recipe": "absent.yaml"}, "absent.yaml"),
        ({"recipe": RECIPE, "name": "a b"}, "the name 'a b' names the recipe's assets"),
        ({"recipe": RECIPE, "owners": ["nobody"]}, "nobody"),
        ({"recipe": RECIPE, "device": "abacus"}, "device"),
        ({"recipe": RECIPE, "colour": "red"}, "colour"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_said_when_the_project_loads(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, mounted: dict[str, object], message: str
):
    shop.mount("bot", attributes(**mounted))
    with pytest.raises(Exception) as raised:
        shop.load(monkeypatch).get_repository_def()
    assert message in "".join(traceback.format_exception(raised.value))


def test_two_recipes_of_one_name_or_one_served_name_are_refused(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    shop.mount("one", attributes(recipe=RECIPE, name="bot"))
    other = shop.mount("two", attributes(recipe={**RECIPE, "ollama": {"name": "two"}}, name="bot", key_prefix="x"))
    with pytest.raises(Exception) as raised:
        shop.load(monkeypatch)
    assert "two components of this project have a recipe named bot" in "".join(traceback.format_exception(raised.value))
    (other / "defs.yaml").write_text(attributes(recipe={**RECIPE, "ollama": {"name": "BOT"}}, name="second"))
    with pytest.raises(Exception) as raised:
        shop.load(monkeypatch)
    assert "ollama.name" in "".join(traceback.format_exception(raised.value))


def test_dg_scaffolds_checks_and_launches(shop: Shop):
    written = shop.dg(
        "scaffold", "defs", "finetune_assets.FinetuneRecipe", "bot", "--model", "./base", "--dataset", "facts"
    )
    assert written.returncode == 0, written.stdout + written.stderr
    checked = shop.dg("check", "defs")
    assert "All definitions loaded successfully." in checked.stdout, checked.stdout + checked.stderr
    launched = shop.dg("launch", "--assets", 'key:"bot/raw_dataset" or key:"bot/dataset_info"')
    assert launched.returncode == 0, launched.stdout + launched.stderr
    published = shop.home / "artifacts" / "bot"
    assert {path.parent.parent.name for path in published.rglob("manifest.json")} == {"raw_dataset", "dataset_info"}


def test_the_whole_chain_runs_in_the_project_that_mounts_it(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
):
    shop = make_shop(tmp_path)
    shutil.copytree(tiny_base, shop.root / "base", dirs_exist_ok=True)
    shop.mount("bot", DEFS_YAML)
    (shop.home / "cache").mkdir()
    (shop.home / "cache" / "wheels").symlink_to(shared_cache() / "wheels")
    definitions = shop.load(monkeypatch)
    with dg.instance_for_test(temp_dir=str(shop.home)) as instance:
        job = definitions.resolve_job_def("ml_chat_bot_job")
        result = job.execute_in_process(instance=instance)
        assert result.success
        _every_proof_is_a_check(result.get_asset_check_evaluations())
        for name in NODES:
            event = instance.get_latest_materialization_event(dg.AssetKey(["ml", "chat", "bot", name]))
            assert event and event.asset_materialization
            assert Path(str(event.asset_materialization.metadata["artifact"].value)).is_relative_to(shop.home)
        sensor = definitions.get_repository_def().get_sensor_def("ml_chat_bot_retrain")
        with dg.build_sensor_context(instance=instance) as context:
            result = sensor(context)
        assert isinstance(result, dg.SensorResult) and "everything is up to date" in str(result.skip_reason)


def _every_proof_is_a_check(evaluations: Sequence[dg.AssetCheckEvaluation]) -> None:
    found = {(check.asset_key.path[-1], check.check_name): check for check in evaluations}
    expected = {
        "dataset_info": {"splits_share_no_row"},
        "merged_model": {"logits", "weights"},
        "gguf_file": {
            *(name.replace(" ", "_") for name in EXACT),
            *("kl_f16", "kl_q8_0", "keeps_training_f16", "keeps_training_q8_0"),
        },
        "ollama_model": {
            *("digest", "weights", "template", "system", "stops", "parameters"),
            *("prompt_tokens", "first_tokens", "stops_by_itself"),
        },
    }
    assert set(found) == {(asset, name) for asset, names in expected.items() for name in names}
    assert found["dataset_info", "splits_share_no_row"].metadata["test rows"].value == 2
    for check, figure in (
        (found["merged_model", "logits"], "relative distance"),
        (found["gguf_file", "kl_q8_0"], "mean KL (nats per token)"),
    ):
        measured, limit = (float(str(check.metadata[name].value)) for name in (figure, "limit"))
        assert 0 < measured <= limit, check.check_name
    failed = {name for (_, name), check in found.items() if not check.passed}
    assert failed - {"keeps_training_f16", "keeps_training_q8_0"} == {
        *("prompt_tokens", "first_tokens", "stops_by_itself")  # no server answers in the tests
    }
    assert {found[key].severity for key in found if not found[key].passed} == {dg.AssetCheckSeverity.WARN}


def test_the_component_is_registered_for_dg():
    registered = [
        entry for entry in entry_points(group="dagster_dg_cli.registry_modules") if entry.name == "finetune_assets"
    ]
    assert registered, "install the project again: pip install -e ."
    module = registered[0].load()
    assert "FinetuneRecipe" in dir(module) and issubclass(module.FinetuneRecipe, dg.Component)


def test_the_package_is_imported_without_dagster():
    script = "import sys, finetune_assets; sys.exit('dagster' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY).returncode == 0


def attributes(**values: object) -> str:
    return yaml.safe_dump({"type": "finetune_assets.FinetuneRecipe", "attributes": values}, sort_keys=False)


def observed(sensor: dg.SensorDefinition, instance: dg.DagsterInstance) -> set[str]:
    """What an observe sensor reports; it is recorded, as the daemon does."""
    with dg.build_sensor_context(instance=instance) as context:
        result = sensor(context)
    assert isinstance(result, dg.SensorResult)
    for event in result.asset_events:
        instance.report_runless_asset_event(event)
    return {event.asset_key.to_user_string() for event in result.asset_events}
