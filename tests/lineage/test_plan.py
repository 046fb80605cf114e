"""Plans: what is stale and why, on real steps of the data room, without a model."""

from __future__ import annotations

import json
import os
import shutil
from importlib import metadata

import pytest

from finetune_assets.assets.dataset_info import DATASET_INFO
from finetune_assets.assets.raw_dataset import RAW_DATASET
from finetune_assets.lineage.graph import NODES, upstream_of
from finetune_assets.lineage.identity import differences, own_ingredients
from finetune_assets.lineage.materialise import Outcome, Step, materialise
from finetune_assets.lineage.plan import make_plan, open_store
from finetune_assets.lineage.planned import Planned
from finetune_assets.recipe.file import load_recipe
from finetune_assets.reporting.errors import BadInput, StepFailed
from finetune_assets.store.artifact import Made
from finetune_assets.store.artifact_store import ArtifactStore
from tests.conftest import MiniProject, rows
from tests.support.history_fixtures import make_chain, stand_in

pytestmark = pytest.mark.fast

BODIES = {"raw_dataset": RAW_DATASET.build, "dataset_info": DATASET_INFO.build}


def plan(mini: MiniProject) -> dict[str, Planned]:
    mini.empty_base()
    return make_plan(load_recipe(mini.recipe_path()), mini, open_store(mini))


def make(mini: MiniProject, asset: str, force: bool = False) -> Outcome:
    mini.empty_base()
    recipe = load_recipe(mini.recipe_path())
    return materialise(asset, recipe, mini, BODIES[asset], lambda event: None, force=force)


def make_data(mini: MiniProject) -> None:
    for asset in BODIES:
        make(mini, asset)


def states(mini: MiniProject) -> tuple[str, str]:
    found = plan(mini)
    return found["raw_dataset"].state, found["dataset_info"].state


def test_a_required_key_that_a_release_begins_to_read(mini: MiniProject):
    recipe = load_recipe(mini.recipe_path())
    with_key = {**own_ingredients(NODES["raw_dataset"], recipe, {}), "upstreams": {}}
    without = {**with_key, "recipe": {}}
    name = ", ".join(recipe.dataset.dataset)
    assert differences(without, with_key, recipe) == [f"dataset.dataset not recorded -> [{name}]"]
    assert differences(with_key, without, recipe) == [f"dataset.dataset [{name}] -> no longer read"]


def test_nothing_is_there_at_first(mini: MiniProject):
    found = plan(mini)
    assert {item.state for item in found.values()} == {"missing"}
    assert found["lora_adapter"].reasons == ("never made", "upstream dataset_info, base_model will run")


def test_what_was_made_is_fresh_and_reused(mini: MiniProject):
    make_data(mini)
    assert states(mini) == ("fresh", "fresh")
    assert make(mini, "dataset_info").reused
    assert not make(mini, "dataset_info", force=True).reused
    assert states(mini) == ("fresh", "fresh")


def test_comments_key_order_and_spelled_out_defaults_change_nothing(mini: MiniProject):
    make_data(mini)
    text = mini.recipe_path().read_text()
    mini.recipe_path().write_text("# a comment\n" + text)
    mini.edit(dataset={"seed": 42, "val_size": 0.0, "dataset_dir": "data"})
    assert states(mini) == ("fresh", "fresh")


def test_a_touched_file_changes_nothing(mini: MiniProject):
    make_data(mini)
    os.utime(mini.root / "data" / "facts.json", (1, 1))
    assert states(mini) == ("fresh", "fresh")


def test_a_reformatted_file_stops_at_dataset_info(mini: MiniProject):
    make_data(mini)
    before = make(mini, "dataset_info").artifact
    mini.write_rows(list(reversed(rows())), indent=2)
    found = plan(mini)
    assert (found["raw_dataset"].state, found["raw_dataset"].reasons) == (
        "stale",
        ("source facts: the same rows, written differently",),
    )
    assert (found["dataset_info"].state, found["dataset_info"].reasons) == ("maybe", ("upstream raw_dataset will run",))
    make_data(mini)
    after = make(mini, "dataset_info").artifact
    assert after.fingerprint != before.fingerprint
    assert after.data_version == before.data_version
    assert states(mini) == ("fresh", "fresh")


def test_a_changed_value_is_named_with_old_and_new(mini: MiniProject):
    make_data(mini)
    mini.edit(dataset={"test_size": 3, "max_samples": 11})
    assert plan(mini)["dataset_info"].reasons == ("dataset.max_samples none -> 11", "dataset.test_size 2.0 -> 3.0")
    assert plan(mini)["raw_dataset"].state == "fresh"


def test_training_values_do_not_touch_the_data(mini: MiniProject):
    make_data(mini)
    mini.edit(train={"learning_rate": 0.1}, ollama={"system": "x"}, gguf={"types": ["f32"]})
    assert states(mini) == ("fresh", "fresh")


def test_going_back_costs_nothing(mini: MiniProject):
    make_data(mini)
    first = make(mini, "dataset_info").artifact.fingerprint
    mini.edit(dataset={"test_size": 3})
    make_data(mini)
    mini.edit(dataset={"test_size": 2})
    assert states(mini) == ("fresh", "fresh")
    outcome = make(mini, "dataset_info")
    assert outcome.reused and outcome.artifact.fingerprint == first


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "train.jsonl is gone"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
        (lambda path: path.write_bytes(path.read_bytes()[::-1]), "the content of train.jsonl has changed"),
    ],
)
def test_damage_is_seen_named_and_mended(mini: MiniProject, damage, reason: str):
    make_data(mini)
    artifact = make(mini, "dataset_info").artifact
    content = (artifact.path / "train.jsonl").read_bytes()
    damage(artifact.path / "train.jsonl")
    found = plan(mini)["dataset_info"]
    assert found.state == "stale" and reason in found.reasons[0]
    make(mini, "dataset_info")
    assert states(mini) == ("fresh", "fresh")
    assert (artifact.path / "train.jsonl").read_bytes() == content


def test_rows_are_counted(mini: MiniProject):
    make_data(mini)
    mini.write_rows([{**rows()[0], "output": "Another."}, *rows()[1:], *rows(14)[12:]])
    assert plan(mini)["raw_dataset"].reasons == ("source facts: 2 rows added, 1 changed",)
    make(mini, "raw_dataset")
    assert plan(mini)["dataset_info"].reasons == ("upstream raw_dataset changed",)
    (mini.root / "data" / "dataset_info.json").write_text(
        json.dumps({"facts": {"file_name": "facts.json", "columns": {"system": "persona"}}})
    )
    assert plan(mini)["raw_dataset"].reasons == ("source facts: columns.system changed in dataset_info.json",)


def test_a_malformed_file_is_for_the_step_to_refuse(mini: MiniProject):
    make_data(mini)
    (mini.root / "data" / "facts.json").write_text('[{"instruction": ')
    assert plan(mini)["raw_dataset"].reasons == ("source facts changed",)


def test_an_adapter_names_the_rows_that_it_would_learn_now(mini: MiniProject):
    made = make_chain(mini)
    mini.write_rows([*rows(), {"instruction": "A new one?", "input": "", "output": "Yes."}])
    make_data(mini)
    now = make(mini, "dataset_info").artifact
    part = next(
        split for split in ("train", "test") if now.part_version(split) != made["dataset_info"].part_version(split)
    )
    reader = {"train": "lora_adapter", "test": "gguf_file"}[part]
    assert f"upstream dataset_info/{part}: 1 row added" in plan(mini)[reader].reasons
    shutil.rmtree(made["dataset_info"].path)  # and now nobody knows
    assert f"upstream dataset_info/{part} changed" in plan(mini)[reader].reasons


def test_only_what_is_asked_for_is_judged(mini: MiniProject):
    whole = plan(mini)
    (mini.root / "base" / "config.json").write_text("{}")
    recipe, store = load_recipe(mini.recipe_path()), open_store(mini)
    for asset in NODES:
        part = make_plan(recipe, mini, store, upto=asset)
        assert set(part) == upstream_of({asset})
        assert part[asset].reasons == whole[asset].reasons
    (mini.root / "base" / "config.json").unlink()
    (mini.root / "base").rmdir()
    assert set(make_plan(recipe, mini, store, upto="dataset_info")) == {"raw_dataset", "dataset_info"}


@pytest.mark.parametrize("package", ["torch", "transformers", "peft", "trl"])
def test_upgrades_that_decide_what_is_learnt(mini: MiniProject, monkeypatch: pytest.MonkeyPatch, package: str):
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "trl", "jieba", "nltk")}
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or installed(name))
    versions[package] = "2.13.0+cpu"
    make_chain(mini)
    versions[package] = "2.13.1+cu130"
    assert {item.state for item in plan(mini).values()} == {"fresh"}
    versions[package] = "2.14.0"
    found = plan(mini)
    assert [name for name, item in found.items() if item.state == "stale"] == ["lora_adapter"]
    assert found["lora_adapter"].reasons == (f"{package} 2.13 -> 2.14",)
    mini.write_rows(rows()[1:])
    found = plan(mini)["lora_adapter"]
    assert found.state == "stale", "whatever comes of the rows"
    assert found.reasons == (f"{package} 2.13 -> 2.14", "upstream dataset_info will run")


def test_a_step_without_its_upstream_says_what_to_do(mini: MiniProject):
    with pytest.raises(StepFailed, match=r"mini/raw_dataset has not been made yet\nmaterialise mini/raw_dataset first"):
        make(mini, "dataset_info")


def test_a_failed_body_publishes_nothing_and_leaves_nothing(mini: MiniProject):
    make(mini, "raw_dataset")
    mini.edit(dataset={"test_size": 0.999})
    (mini.root / "data" / "facts.json").write_text('[{"instruction": "a", "output": ""}]')
    make(mini, "raw_dataset")
    with pytest.raises(BadInput, match="has no answer"):
        make(mini, "dataset_info")
    folder = open_store(mini).folder("mini", "dataset_info")
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_what_a_killed_builder_left_is_swept(mini: MiniProject):
    make_data(mini)
    left = open_store(mini).folder("mini", "dataset_info") / ".staging-dead-abc"
    left.mkdir()
    (left / "train.jsonl").write_text("half")
    assert states(mini) == ("fresh", "fresh")
    make(mini, "dataset_info", force=True)
    assert not left.exists()


def test_missing_sources_are_bad_input(mini: MiniProject):
    (mini.root / "data" / "facts.json").unlink()
    with pytest.raises(BadInput, match="no such file"):
        plan(mini)
    mini.write_rows(rows())
    shutil.rmtree(mini.root / "base", ignore_errors=True)
    with pytest.raises(BadInput, match="base model not found"):
        make_plan(load_recipe(mini.recipe_path()), mini, open_store(mini))


def test_two_recipes_on_the_same_data_share_nothing(mini: MiniProject):
    mini.copy_recipe("second")
    make_data(mini)
    mini.empty_base()
    second = make_plan(load_recipe(mini.recipe_path("second")), mini, open_store(mini))
    assert second["raw_dataset"].state == "missing"


def test_the_store_works_without_its_digest_cache(mini: MiniProject):
    make_data(mini)
    store: ArtifactStore = open_store(mini)
    (mini.cache / "digests.sqlite").write_bytes(b"this is no database")
    assert states(mini) == ("fresh", "fresh")
    assert store.current("mini", "dataset_info") is not None


def test_an_adapter_is_not_scored_on_rows_that_were_held_out_after_it_was_trained(mini: MiniProject):
    """A partial selection: the data are split anew, the adapter is left as it was, its scores are asked for."""
    make_chain(mini)
    mini.edit(dataset={"seed": 43})
    make_data(mini)
    recipe = load_recipe(mini.recipe_path())
    with pytest.raises(StepFailed, match="mini/lora_adapter was made from a different dataset_info/train") as caught:
        materialise("eval_metrics", recipe, mini, stand_in, lambda event: None)
    assert caught.value.hint == "materialise mini/lora_adapter as well"
    materialise("lora_adapter", recipe, mini, stand_in, lambda event: None)
    assert not materialise("eval_metrics", recipe, mini, stand_in, lambda event: None).reused


def test_an_adapter_is_not_merged_into_another_base(mini: MiniProject):
    make_chain(mini)
    (mini.root / "base" / "config.json").write_text('{"hidden_size": 8}')
    recipe = load_recipe(mini.recipe_path())

    def other_weights(step: Step) -> Made:
        (step.staging / "weights.json").write_text("other")
        return Made({})

    materialise("base_model", recipe, mini, other_weights, lambda event: None)
    with pytest.raises(StepFailed, match="mini/lora_adapter was made from a different base_model than the current one"):
        materialise("merged_model", recipe, mini, stand_in, lambda event: None)
