"""Bad recipes of every kind: each is refused by name, at once, and a good recipe in the same folder still works."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import dagster as dg
import pytest

from finetune_assets.assets.keys import job_name, word_of
from finetune_assets.definitions import load_definitions
from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.plan import make_plan, open_store
from finetune_assets.recipe.file import find_recipe, load_recipe
from finetune_assets.reporting.errors import BadInput
from tests.conftest import REPOSITORY, MiniProject
from tests.support.hostile.recipes import GOOD, KINDS, put

SECONDS = 5


@pytest.mark.parametrize("kind", KINDS, ids=ascii)
def test_each_is_refused_by_name(tmp_path: Path, kind: str):
    path, words = put(tmp_path, kind)
    began = time.monotonic()
    with pytest.raises(BadInput) as caught:
        load_recipe(find_recipe(kind, tmp_path))
    assert time.monotonic() - began < SECONDS
    message = str(caught.value)
    assert message.startswith(str(path)) and words in message
    assert len(message) < 10_000


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_recipe_that_may_not_be_read(tmp_path: Path):
    path = tmp_path / "mini.yaml"
    path.write_text(GOOD)
    path.chmod(0)
    with pytest.raises(BadInput, match=r"mini.yaml: cannot be read: Permission denied"):
        load_recipe(path)


def test_a_name_that_is_not_text(tmp_path: Path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.yaml"))
    path.write_text(GOOD)
    with pytest.raises(BadInput) as caught:
        load_recipe(path)
    str(caught.value).encode()
    assert "a\\udcff.yaml" in str(caught.value)


@pytest.mark.parametrize("spec", ["a\0b", "x" * 5000, "x" * 300, "/dev/null/x.yaml", "/dev/zero", ".", "..", "", "~"])
def test_words_that_name_no_recipe(mini: MiniProject, spec: str):
    with pytest.raises(BadInput):
        load_recipe(find_recipe(spec, mini.configs))


def test_a_good_file_with_a_byte_order_mark(tmp_path: Path):
    (tmp_path / "mini.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("NAME", "mini").encode())
    assert load_recipe(tmp_path / "mini.yaml").ollama.name == "mini"


def test_aliases_and_merges_work_within_limits(tmp_path: Path):
    text = GOOD.replace("NAME", "mini") + "train: &t {lora_rank: 4}\nevaluate: {max_new_tokens: 3}\n"
    text = text.replace("train: &t {lora_rank: 4}", "train:\n  <<: &t {lora_rank: 4}\n  seed: 3")
    (tmp_path / "mini.yaml").write_text(text)
    train = load_recipe(tmp_path / "mini.yaml").train
    assert (train.lora_rank, train.seed) == (4, 3)


def test_one_composed_name_for_both_spellings(mini: MiniProject):
    """macOS stores names decomposed; people type composed ones."""
    composed, decomposed = (unicodedata.normalize(form, "génial") for form in ("NFC", "NFD"))
    mini.recipe_path(decomposed).write_text(mini.recipe_path().read_text())
    assert load_recipe(find_recipe(composed, mini.configs)).name == composed
    mini.recipe_path(composed).write_text(mini.recipe_path().read_text())
    for name in (composed, decomposed):
        with pytest.raises(BadInput, match="is the same text as"):
            load_recipe(mini.recipe_path(name))
    groups = load_definitions(mini).resolve_asset_graph()
    assert sum(key.path[-1] == "recipe" for key in groups.get_all_asset_keys()) == 2


def test_names_that_dagster_would_confuse(mini: MiniProject):
    for name in ("客服", "a-b", "a_b", word_of("客服"), "mini_config", "mini__config"):
        mini.copy_recipe(name)
        mini.edit(name, ollama={"name": f"m{word_of(name)}"})
    definitions = load_definitions(mini)
    graph = definitions.resolve_asset_graph()
    for name in ("a-b", "a_b", word_of("客服"), "mini_config", "mini__config"):
        assert graph.has(dg.AssetKey([word_of(name), "lora_adapter"])), name
        job = definitions.resolve_job_def(job_name(name))
        selected = set(job.asset_layer.executable_asset_keys)
        assert {key.path[0] for key in selected} == {word_of(name)} and len(selected) == len(NODES)
    (refused,) = [key for key in graph.get_all_asset_keys() if key.path[-1] == "recipe"]
    assert "Dagster calls it" in str(graph.get(refused).description)


def test_each_in_a_folder_with_a_good_one(mini: MiniProject):
    """All of them in one folder: Dagster shows the good recipe and each bad one, and each sensor ticks."""
    mini.empty_base()
    placed = [put(mini.configs, kind) for kind in KINDS]
    Path(os.fsdecode(os.fsencode(mini.configs) + b"/a\xff.yaml")).write_text(GOOD)
    began = time.monotonic()
    definitions = load_definitions(mini)
    assert time.monotonic() - began < 3 * SECONDS
    graph = definitions.resolve_asset_graph()
    descriptions = [str(graph.get(key).description) for key in graph.get_all_asset_keys() if key.path[-1] == "recipe"]
    assert len(descriptions) == len(KINDS) + 1
    for path, words in placed:
        assert any(str(path) in text and words in text for text in descriptions), path
    assert graph.has(dg.AssetKey(["mini", "lora_adapter"]))
    repository = definitions.get_repository_def()
    with dg.DagsterInstance.ephemeral() as instance:
        for sensor in repository.sensor_defs:
            if isinstance(sensor, dg.RunStatusSensorDefinition):
                continue
            context = dg.build_sensor_context(instance, sensor_name=sensor.name, repository_def=repository)
            result = sensor.evaluate_tick(context)
            assert result.skip_message, sensor.name
            if sensor.name == "observe":
                assert all(words in result.skip_message for _, words in placed)
    recipe = load_recipe(find_recipe("mini", mini.configs))
    assert set(make_plan(recipe, mini, open_store(mini))) == set(NODES)


def test_the_command_line_prints_one_message(mini: MiniProject):
    environment = {**os.environ, "FINETUNE_PROJECT": str(mini.root), "DAGSTER_HOME": str(mini.home)}
    environment["PYTHONPATH"] = str(REPOSITORY)
    for kind in ("recursive", "a_pipe", "large", "bomb", "a b"):
        _, words = put(mini.configs, kind)
        for command in ("plan", "run"):
            done = subprocess.run(
                [sys.executable, "-m", "finetune_assets.cli", command, kind],
                env=environment, cwd=mini.root, capture_output=True, text=True, timeout=10,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 * 10**9, 2 * 10**9)),
            )  # fmt: skip
            assert done.returncode == 2, done.stderr
            assert words in done.stderr and "Traceback" not in done.stderr and "unexpected" not in done.stderr
