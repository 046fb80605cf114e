"""Runs at the same moment, and edits while one runs: everything is made once, of what the run started with."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.data import snapshot
from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.materialise import Step, materialise
from finetune_assets.lineage.plan import open_store
from finetune_assets.recipe.file import load_recipe
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.store.artifact import Artifact, Made
from finetune_assets.store.artifact_store import STAGING
from tests.conftest import REPOSITORY, MiniProject, make_mini, rows, shared_cache
from tests.whole.test_chain import FINETUNE, Chain

PATIENCE = 150.0  # seconds that a run may take on a busy machine


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Chain:
    """A project of which nothing was made yet."""
    folder = tmp_path_factory.mktemp("concurrent")
    project = make_mini(folder, base=tiny_base)
    project.cache.mkdir(parents=True)
    (project.cache / "wheels").symlink_to(shared_cache() / "wheels")
    shutil.copy(REPOSITORY / "dagster_home" / "dagster.yaml", project.home)
    (folder / "tmp").mkdir()
    chain = Chain(project)
    chain.environment["TMPDIR"] = str(folder / "tmp")  # where the lock of the device lies: nobody else waits for it
    return chain


class Running:
    """A `finetune run RECIPE ... --json` on its way."""

    def __init__(self, chain: Chain, *arguments: str):
        self.child = subprocess.Popen(
            [*FINETUNE, "run", *arguments, "--json"],
            env=chain.environment,
            cwd=chain.project.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def made(self) -> set[str]:
        """The assets that it made itself, once it is through."""
        try:
            out, errors = self.child.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired as late:
            pytest.fail(f"it hangs, having said {(late.stderr or b'').decode()}")
        assert self.child.returncode == 0, errors
        said = json.loads(out)
        return set(said["ran"]) - set(said["reused"])

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.child.poll() is not None:
                pytest.fail(f"it ended before that, having said {self.child.communicate()}")
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def start(chain: Chain) -> Iterator[Callable[..., Running]]:
    """Starts runs, and ends what a failing test leaves of them."""
    started: list[Running] = []

    def begin(*arguments: str) -> Running:
        started.append(Running(chain, *arguments))
        return started[-1]

    yield begin
    for running in started:
        running.child.kill()
        running.child.wait()


def in_the_making(chain: Chain, asset: str, recipe: str = "mini") -> Callable[[], object]:
    folder = chain.project.store / recipe / asset
    return lambda: list(folder.glob(f"{STAGING}*"))


def assert_whole(chain: Chain, recipe: str = "mini") -> dict[str, list[Artifact]]:
    """Every artifact has its files, and nothing else lies about; the artifacts of each asset."""
    store = open_store(chain.project)
    found = {asset: store.published(recipe, asset) for asset in NODES}
    for asset, artifacts in found.items():
        names = {path.name for path in store.folder(recipe, asset).glob("*")}
        assert names <= {".lock", "CURRENT", *(artifact.fingerprint for artifact in artifacts)}
        assert [artifact.damage(store.digests) for artifact in artifacts] == [None] * len(artifacts)
    return found


def states(chain: Chain, recipe: str = "mini") -> dict[str, str]:
    return {item["asset"]: item["state"] for item in chain.json("plan", recipe)}


def reasons(chain: Chain) -> dict[str, list[str]]:
    return {item["asset"]: item["reasons"] for item in chain.json("plan", "mini")}


def manifest(chain: Chain, asset: str, recipe: str = "mini") -> dict[str, Any]:
    artifact = open_store(chain.project).current(recipe, asset)
    assert artifact is not None
    return dict(artifact.manifest)


def test_two_runs_of_one_recipe_at_the_same_moment_make_everything_once(chain: Chain, start: Callable[..., Running]):
    first, second = start("mini"), start("mini")
    made = first.made(), second.made()
    assert made[0] | made[1] == set(NODES)
    assert not made[0] & made[1], "made twice"
    assert {asset: len(artifacts) for asset, artifacts in assert_whole(chain).items()} == dict.fromkeys(NODES, 1)
    assert set(states(chain).values()) == {"fresh"}


def test_edits_while_it_runs_do_not_reach_it_and_are_there_for_the_next(chain: Chain, start: Callable[..., Running]):
    chain.project.write_rows(rows(11))
    chain.project.edit(train={"learning_rate": 2e-3})
    running = start("mini", "--to", "merged_model")
    running.wait_for(in_the_making(chain, "lora_adapter"))
    chain.project.write_rows(rows(10))
    chain.project.edit(train={"learning_rate": 3e-3}, export={"export_dtype": "float16"})
    assert running.made() == {"raw_dataset", "dataset_info", "lora_adapter", "merged_model"}
    adapter, merged = manifest(chain, "lora_adapter"), manifest(chain, "merged_model")
    assert adapter["ingredients"]["recipe"]["train.learning_rate"] == 2e-3
    assert adapter["inputs"]["dataset_info"] == manifest(chain, "dataset_info")["fingerprint"]
    assert manifest(chain, "dataset_info")["metrics"]["rows"]["train"] == 9, "11 rows, 2 of them for the test"
    assert merged["inputs"]["lora_adapter"] == adapter["fingerprint"]
    assert "export.export_dtype" not in merged["ingredients"]["recipe"]

    found = reasons(chain)
    assert any("facts" in reason for reason in found["raw_dataset"])
    assert "train.learning_rate 0.002 -> 0.003" in found["lora_adapter"]
    assert "export.export_dtype auto -> float16" in found["merged_model"]
    chain.project.write_rows(rows(11))
    chain.project.edit(train={"learning_rate": 2e-3}, export={"export_dtype": None})
    assert states(chain)["merged_model"] == "fresh"
    assert_whole(chain)


def test_a_file_that_changes_as_it_is_read_is_not_taken_for_what_it_was(mini: MiniProject):
    def edited_first(step: Step) -> Made:
        mini.write_rows(rows(4))  # after its digest was taken, before it is copied
        return Made(snapshot.take(mini.root / "data", step.recipe.dataset.dataset, step.staging))

    recipe = load_recipe(mini.recipe_path())
    with pytest.raises(StepFailed, match="changed while"):
        materialise("raw_dataset", recipe, mini, edited_first, lambda event: None)
    assert open_store(mini).published("mini", "raw_dataset") == []


def test_two_recipes_on_one_data_set_run_at_the_same_time(chain: Chain, start: Callable[..., Running]):
    chain.project.copy_recipe("second")
    chain.project.edit("second", train={"learning_rate": 5e-3}, ollama={"name": "second"})
    chain.project.edit(train={"learning_rate": 4e-3})
    runs = {name: start(name, "--to", "lora_adapter") for name in ("mini", "second")}
    assert runs["mini"].made() == {"lora_adapter"}
    assert runs["second"].made() == {"raw_dataset", "dataset_info", "base_model", "lora_adapter"}
    for name, rate in (("mini", 4e-3), ("second", 5e-3)):
        assert_whole(chain, name)
        assert states(chain, name)["lora_adapter"] == "fresh"
        assert manifest(chain, "lora_adapter", name)["ingredients"]["recipe"]["train.learning_rate"] == rate
    versions = [manifest(chain, "dataset_info", name)["data_version"] for name in ("mini", "second")]
    assert versions[0] == versions[1]
    adapters = [manifest(chain, "lora_adapter", name)["data_version"] for name in ("mini", "second")]
    assert adapters[0] != adapters[1]
