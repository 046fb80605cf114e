"""`finetune explain`: the whole ancestry of an artifact, from the manifests alone."""

from __future__ import annotations

import json
import shutil

import pytest
from rich.console import Console

from finetune_assets.cli.history import ancestry_tree
from finetune_assets.lineage.ancestry import Ancestor, ancestry
from finetune_assets.lineage.graph import NODES, upstream_of
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.store.artifact import Artifact
from tests.cli.test_cli import finetune
from tests.conftest import MiniProject, rows
from tests.support.history_fixtures import make_chain, store_of

KEYS = {
    *("asset", "fingerprint", "present", "path", "data_version", "created", "seconds", "code_version", "recipe"),
    *("sources", "tools", "libraries", "seed", "device", "precision", "metrics", "rows", "inputs"),
}


@pytest.fixture
def made(mini: MiniProject) -> dict[str, Artifact]:
    mini.edit(train={"seed": 7})
    return make_chain(mini)


def explained(mini: MiniProject, asset: str) -> list[Ancestor]:
    return ancestry("mini", asset, store_of(mini))


def by_asset(found: list[Ancestor]) -> dict[str, dict]:
    return {item.asset: item.described() for item in found}


def text(found: list[Ancestor]) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(ancestry_tree("mini", found))
    return capture.get()


@pytest.mark.parametrize("asset", list(NODES))
def test_all_that_it_was_made_of_and_no_more(mini: MiniProject, made: dict[str, Artifact], asset: str):
    found = explained(mini, asset)
    assert found[0].asset == asset
    assert [item.asset for item in found] == [name for name in reversed(NODES) if name in upstream_of({asset})]
    for item in found:
        facts = item.described()
        assert set(facts) == KEYS
        assert facts["fingerprint"] == made[item.asset].fingerprint
        assert facts["inputs"] == {up.asset: made[up.asset].fingerprint for up in NODES[item.asset].upstreams}
        assert item.fingerprint in text(found)


def test_what_is_told_of_each(mini: MiniProject, made: dict[str, Artifact]):
    facts = by_asset(explained(mini, "ollama_model"))
    adapter, data = facts["lora_adapter"], facts["dataset_info"]
    assert adapter["recipe"]["train.learning_rate"] == 1e-3
    assert (adapter["seed"], adapter["device"], adapter["precision"]) == (7, "a stand-in", "fp32")
    assert adapter["metrics"] == {"rows": 10, "final_loss": 0.5}
    assert adapter["libraries"]["torch"] and facts["gguf_file"]["tools"]["xllamacpp"]
    assert adapter["data_version"] == made["lora_adapter"].data_version
    assert data["rows"] == made["dataset_info"].manifest["parts"]
    assert adapter["rows"] == {part: data["rows"][part] for part in ("train", "validation")}
    assert data["metrics"] == {"rows.train": 10, "rows.validation": 0, "rows.test": 2, "duplicates_dropped": 0}
    assert set(facts["raw_dataset"]["sources"]) == {"facts"}
    assert facts["raw_dataset"]["recipe"] == {"dataset.dataset": ["facts"]}
    assert facts["ollama_model"]["metrics"]["digest"] == made["ollama_model"].metrics["digest"]


def test_the_tree(mini: MiniProject, made: dict[str, Artifact]):
    shown = text(explained(mini, "ollama_model"))
    assert shown.startswith(f"mini/ollama_model {made['ollama_model'].fingerprint}\n")
    for words in (
        "train.learning_rate 0.001",
        "metrics  rows 10, final_loss 0.5",
        "libraries  accelerate",  # once, where they are all the same
        *(f"data version  {artifact.data_version}" for name, artifact in made.items() if name != "eval_metrics"),
    ):
        assert shown.count(words) == 1, words
    assert "on a stand-in (fp32), seed 7" in shown
    assert "as above" in shown


def test_the_current_one_is_meant(mini: MiniProject, made: dict[str, Artifact]):
    mini.edit(train={"learning_rate": 2e-3})
    again = make_chain(mini)
    assert by_asset(explained(mini, "merged_model"))["lora_adapter"]["recipe"]["train.learning_rate"] == 2e-3
    store_of(mini).make_current(made["merged_model"])
    facts = by_asset(explained(mini, "merged_model"))
    assert facts["lora_adapter"]["recipe"]["train.learning_rate"] == 1e-3
    assert again["base_model"].fingerprint == facts["base_model"]["fingerprint"]


def test_an_asset_of_two_snapshots(mini: MiniProject, made: dict[str, Artifact]):
    mini.write_rows([*reversed(rows())], indent=1)
    mini.edit(evaluate={"max_new_tokens": 5})
    again = make_chain(mini)
    found = explained(mini, "eval_metrics")
    snapshots = [item.fingerprint for item in found if item.asset == "dataset_info"]
    assert set(snapshots) == {made["dataset_info"].fingerprint, again["dataset_info"].fingerprint}
    assert [item.asset for item in found].count("raw_dataset") == 2


def test_an_ancestor_that_is_gone(mini: MiniProject, made: dict[str, Artifact]):
    store_of(mini).remove(made["lora_adapter"])
    found = explained(mini, "gguf_file")
    assert {"merged_model", "lora_adapter", "base_model"} <= {item.asset for item in found}
    facts = by_asset(found)["lora_adapter"]
    assert set(facts) == KEYS
    assert facts["fingerprint"] == made["lora_adapter"].fingerprint
    assert facts["present"] is False and facts["created"] is None and facts["inputs"] is None
    assert "removed, with its manifest" in text(found)


def test_never_made(mini: MiniProject):
    with pytest.raises(StepFailed, match="mini/merged_model has not been made yet\nfinetune run mini --to merged"):
        explained(mini, "merged_model")


def test_on_the_command_line(mini: MiniProject, made: dict[str, Artifact]):
    done = finetune(mini, "explain", "mini/lora_adapter")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"mini/lora_adapter {made['lora_adapter'].fingerprint}")
    done = finetune(mini, "explain", f"{mini.recipe_path()}/lora_adapter", "--json")
    answer = json.loads(done.stdout)
    assert (answer["recipe"], answer["asset"]) == ("mini", "lora_adapter")
    assert [item["asset"] for item in answer["ancestry"]] == [
        *("lora_adapter", "base_model", "dataset_info", "raw_dataset")
    ]
    assert all(set(item) == KEYS for item in answer["ancestry"])


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("mini", "'mini' is not of the form RECIPE/ASSET"),
        ("mini/lora_adaptor", "did you mean 'lora_adapter'?"),
        ("minni/lora_adapter", "unknown recipe 'minni'; did you mean 'mini'?"),
        ("../lora_adapter", "'..'"),
        ("/lora_adapter", "is not of the form RECIPE/ASSET"),
    ],
)
def test_what_is_asked_wrongly(mini: MiniProject, asked: str, words: str):
    done = finetune(mini, "explain", asked)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not done.stdout


def test_without_its_recipe(mini: MiniProject, made: dict[str, Artifact]):
    mini.recipe_path().unlink()
    shutil.rmtree(mini.root / "data")
    assert finetune(mini, "explain", "mini/ollama_model").returncode == 0
