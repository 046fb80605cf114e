"""`finetune gc` during builds and with running servers, killed at any moment, and on random histories."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_assets.export.ollama import model_store as ollama_store
from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.retention import reasons_to_stay
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.store.artifact import Artifact
from finetune_assets.store.artifact_store import ArtifactStore
from tests.conftest import MiniProject, make_mini
from tests.support.history_fixtures import make_chain, plan_of, store_of
from tests.support.retention_fixtures import gc, keys, reasons, there, three_rates
from tests.support.servers.fixed_answers import stand_in


@pytest.fixture
def three(mini: MiniProject) -> list[dict[str, Artifact]]:
    return three_rates(mini)


@pytest.mark.parametrize("busy", ["raw_dataset", "lora_adapter", "ollama_model"])
def test_what_is_being_built_now(mini: MiniProject, three: list[dict[str, Artifact]], busy: str):
    store = store_of(mini)
    folder = store.folder("mini", busy)
    with store.building("mini", busy, "abc") as staging:
        (staging / "half").write_text("x")
        done = gc(mini)
        assert (staging / "half").read_text() == "x"
        assert not [item for item in done.removed if item.path.parent == folder]
    left = there(mini)
    read = {busy, *(up.asset for up in NODES[busy].upstreams)}
    for chain in three:
        for name in read:
            assert (name, chain[name].fingerprint) in left, "what is built, and what the build may be reading"
    for asset, fingerprint in left:
        artifact = store.get("mini", asset, fingerprint)
        assert artifact is not None and set(artifact.inputs.items()) <= left
    gc(mini)
    assert there(mini) == keys(three[2])


def test_what_a_build_may_be_reading(mini: MiniProject):
    """No manifest names the inputs of a build in progress yet."""
    made = []
    for size in (2, 3, 4):
        mini.edit(dataset={"test_size": size})
        made.append(("dataset_info", make_chain(mini, upto="dataset_info")["dataset_info"].fingerprint))
    with store_of(mini).building("mini", "lora_adapter", "abc"):
        assert reasons(gc(mini))[made[0][1]] == ("lora_adapter is being built now",)
    assert set(made) < there(mini)
    gc(mini)
    assert set(made) & there(mini) == {made[2]}


def test_an_input_that_went_while_the_build_waited(mini: MiniProject, monkeypatch: pytest.MonkeyPatch):
    made = make_chain(mini, upto="dataset_info")
    building = ArtifactStore.building

    def waited(store: ArtifactStore, recipe: str, asset: str, fingerprint: str, waits: Callable[[], None]):
        store.remove(made["raw_dataset"])
        return building(store, recipe, asset, fingerprint, waits)

    mini.edit(dataset={"test_size": 3})
    monkeypatch.setattr(ArtifactStore, "building", waited)
    with pytest.raises(
        StepFailed, match=f"raw_dataset {made['raw_dataset'].fingerprint} was removed in the meantime\nrun ag"
    ):
        make_chain(mini, upto="dataset_info")
    assert not list(mini.store.rglob(".staging-*"))


def test_a_held_lock_protects_a_staging_folder(mini: MiniProject, three: list[dict[str, Artifact]]):
    folder = store_of(mini).folder("mini", "lora_adapter")
    dead = folder / ".staging-dead"
    dead.mkdir()
    (dead / "half").write_text("12345")
    with FileLock(folder / ".lock"):
        assert not [item for item in gc(mini).removed if item.kind == "staging"]
        assert dead.is_dir()
    done = gc(mini, dry_run=True)
    assert [(item.kind, item.path, item.bytes) for item in done.removed if item.path == dead] == [("staging", dead, 5)]
    assert dead.is_dir()
    gc(mini)
    assert not dead.exists()


def kill(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[None]:
    """Interrupt the deletion of the n-th folder, after one of its files."""
    calls = 0
    real = shutil.rmtree

    def rmtree(path: Path, *arguments: object, **named: object) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            next(file for file in Path(path).rglob("*") if file.is_file()).unlink()
            raise KeyboardInterrupt
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", rmtree)
        yield


@pytest.mark.parametrize("at", [1, 2, 3, 5, 9])
def test_killed_in_the_middle(mini: MiniProject, three: list[dict[str, Artifact]], monkeypatch, at: int):
    for _ in kill(monkeypatch, at):
        with pytest.raises(KeyboardInterrupt):
            gc(mini)
    store, left = store_of(mini), there(mini)
    assert len(left) == len(set().union(*map(keys, three))) - at
    for asset, fingerprint in left:
        artifact = store.get("mini", asset, fingerprint)
        assert artifact is not None and artifact.damage(store.digests) is None
        assert set(artifact.inputs.items()) <= left, "downstream first: what is left can be served, explained, built on"
    assert {item.state for item in plan_of(mini).values()} == {"fresh"}
    assert len(list(mini.store.rglob(".staging-*"))) == 1
    done = gc(mini)
    assert [item.kind for item in done.removed].count("staging") == 1
    assert not list(mini.store.rglob(".staging-*"))
    assert there(mini) == keys(three[2])


def test_the_next_build_sweeps_what_a_killed_collection_left(mini: MiniProject, three, monkeypatch):
    for _ in kill(monkeypatch, 1):
        with pytest.raises(KeyboardInterrupt):
            gc(mini)
    (left,) = mini.store.rglob(".staging-*")
    with store_of(mini).building("mini", left.parent.name, "abc"):
        assert not left.exists()


def test_orphan_pointers(mini: MiniProject):
    make_chain(mini)
    folder = store_of(mini).folder("mini", "raw_dataset")
    old, new = folder / ".CURRENT-old", folder / ".CURRENT-new"
    for path in (old, new):
        path.write_text("half")
    long_ago = time.time() - 7200
    os.utime(old, (long_ago, long_ago))
    assert [(item.kind, item.path) for item in gc(mini).removed] == [("temporary", old)]
    assert new.is_file() and not old.exists()


def test_blobs_of_no_model(mini: MiniProject, three: list[dict[str, Artifact]]):
    models = mini.ollama_models
    blobs = models / "blobs"
    ours = ollama_store.read(models, "mini")
    for name in ("partial-abc", "sha256-" + "0" * 64, "sha256-" + "1" * 64 + "-partial", "readme"):
        (blobs / name).write_text("12345678")
    (models / "manifests" / "partial-x").write_text("{")
    done = gc(mini, dry_run=True)
    loose = {item.path.name for item in done.removed if item.kind == "blob"}
    manifest = ollama_store.manifest_path(models, "mini").read_text()
    named = {path.name for path in blobs.iterdir() if path.name.removeprefix("sha256-") in manifest}
    assert len(named) == 4 and not named & loose
    assert {"partial-abc", "partial-x", "sha256-" + "0" * 64} < loose
    assert len(loose) == 3 + 2, "weights of the two models that were served before; the configuration is that of all"
    assert ollama_store.read(models, "mini") == ours
    with ollama_store.lock(models):
        assert (models, "a model is being written") in gc(mini, dry_run=True).left_alone
    gc(mini)
    assert {path.name for path in blobs.iterdir()} == named | {"sha256-" + "1" * 64 + "-partial", "readme"}
    assert ollama_store.read(models, "mini") == ours


def test_a_server_over_our_store_is_left_alone(
    mini: MiniProject, three: list[dict[str, Artifact]], monkeypatch: pytest.MonkeyPatch
):
    digest = ollama_store.read(mini.ollama_models, "mini")
    tags = {"models": [{"name": "mini:latest", "digest": digest}]}
    for models in (tags, {"models": []}):
        with stand_in({"/api/version": {"version": "1"}, "/api/tags": models}) as host:
            monkeypatch.setenv("OLLAMA_HOST", host)
            done = gc(mini, dry_run=True)
        assert done.left_alone == [(mini.ollama_models, f"the Ollama server at {host} may be running over this store")]
        assert not [item for item in done.removed if item.kind == "blob"]
    tags["models"].append({"name": "another:latest", "digest": "f" * 64})
    with stand_in({"/api/version": {"version": "1"}, "/api/tags": tags}) as host:
        monkeypatch.setenv("OLLAMA_HOST", host)
        assert len([item for item in gc(mini, dry_run=True).removed if item.kind == "blob"]) == 2


def test_a_store_that_cannot_be_written(mini: MiniProject, three, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    before = there(mini)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StepFailed, match="Permission denied; what is left is intact"):
        gc(mini)
    assert there(mini) == before


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Artifact], dict[tuple[str, str], list[str]], int]:
    """Random artifacts made from random earlier ones, some of them needed."""
    found: dict[str, list[Artifact]] = {}
    for name, node in NODES.items():
        found[name] = []
        if all(found[up.asset] for up in node.upstreams):
            for number in range(draw(st.integers(0, 4))):
                inputs = {up.asset: draw(st.sampled_from(found[up.asset])).fingerprint for up in node.upstreams}
                manifest = {
                    "asset": name,
                    "fingerprint": f"{name}-{number}",
                    "created": f"2026-01-01T00:00:{draw(st.integers(10, 59))}+00:00",
                    "inputs": inputs,
                }
                found[name].append(Artifact(Path(name, str(number)), manifest))
    every = [artifact for own in found.values() for artifact in own]
    needed = draw(st.lists(st.sampled_from(every), max_size=3)) if every else []
    return every, {(item.manifest["asset"], item.fingerprint): ["needed"] for item in needed}, draw(st.integers(0, 3))


@settings(max_examples=300, deadline=None)
@given(histories())
def test_an_input_of_what_stays_always_stays(history: tuple[list[Artifact], dict[tuple[str, str], list[str]], int]):
    artifacts, roots, keep = history
    stay = reasons_to_stay(artifacts, roots, keep)
    by_key = {(item.manifest["asset"], item.fingerprint): item for item in artifacts}
    assert all(stay.values()), "each for a reason"
    assert set(roots) <= set(stay)
    for key in stay:
        assert set(by_key[key].inputs.items()) <= set(stay)
    for name in NODES:
        own = sorted((item for item in artifacts if item.manifest["asset"] == name), key=lambda item: item.created)
        for artifact in own[len(own) - keep :] if keep and len(own) > keep else own if keep else []:
            assert (name, artifact.fingerprint) in stay
    # and nothing stays but for one of these reasons
    for (asset, fingerprint), why in stay.items():
        for reason in why:
            if reason.startswith("input of"):
                _, _, user, _ = reason.split(" ")
                assert any(key[0] == user and by_key[key].inputs.get(asset) == fingerprint for key in stay)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_history_on_disk(tmp_path: Path, data: st.DataObject):
    """Edits, runs and collections in any order: every artifact on disk has its inputs, and the plan still works."""
    mini = make_mini(Path(str(tmp_path), str(time.monotonic_ns())))
    make_chain(mini)
    for _ in range(data.draw(st.integers(1, 4))):
        rate = data.draw(st.sampled_from([1e-3, 2e-3]))
        size = data.draw(st.sampled_from([2, 3]))
        mini.edit(train={"learning_rate": rate}, dataset={"test_size": size})
        if data.draw(st.booleans()):
            make_chain(mini)
        before = {key for name, item in plan_of(mini).items() if item.artifact for key in [(name, item.wanted)]}
        gc(mini, keep=data.draw(st.integers(0, 2)))
        store, left = store_of(mini), there(mini)
        assert before <= left
        for asset, fingerprint in left:
            artifact = store.get("mini", asset, fingerprint)
            assert artifact is not None and set(artifact.inputs.items()) <= left
        for name in NODES:
            assert store.current("mini", name) is not None


def test_the_collector_takes_no_lock_with_it(mini: MiniProject, three: list[dict[str, Artifact]]):
    gc(mini)
    store = store_of(mini)
    for name in NODES:
        with store.lock("mini", name).acquire(timeout=0):
            pass
