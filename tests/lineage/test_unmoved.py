"""Artifacts of an earlier commit: code that moved since then, and does what it did, still calls all of them fresh."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from tests.cli.test_cli import finetune
from tests.conftest import MiniProject
from tests.support.records.make_chain_fixture import ARCHIVE

pytestmark = pytest.mark.fast

ASSETS = (
    *("raw_dataset", "dataset_info", "base_model", "lora_adapter"),
    *("eval_metrics", "merged_model", "gguf_file", "ollama_model"),
)


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MiniProject:
    """A project whose chain the earlier commit ran, in a new place and without its cache."""
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)  # it would be another converter than the pinned one
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return MiniProject(tmp_path, tmp_path / "dagster_home")


def plan(project: MiniProject) -> dict[str, list[str]]:
    """Ask the command line for the plan: asset -> its state and the reasons for it."""
    done = finetune(project, "plan", "mini", "--json")
    assert done.returncode == 0, done.stderr
    return {item["asset"]: [item["state"], *item["reasons"]] for item in json.loads(done.stdout)}


def test_artifacts_of_an_earlier_commit_are_fresh(earlier: MiniProject) -> None:
    assert plan(earlier) == {asset: ["fresh"] for asset in ASSETS}, (
        "the reasons name the ingredient that changed; if it was changed on purpose, see make_chain_fixture.py"
    )


def test_a_changed_recipe_value_makes_its_asset_stale(earlier: MiniProject) -> None:
    earlier.edit(gguf={"max_kl": {"q4_0": 0.25}})
    assert {asset: entry for asset, entry in plan(earlier).items() if entry != ["fresh"]} == {
        "gguf_file": ["stale", "gguf.max_kl {'q4_0': 0.5} -> {'q4_0': 0.25}"],
        "ollama_model": ["maybe", "upstream gguf_file will run"],
    }
