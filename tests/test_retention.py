"""What `finetune gc` keeps, what it removes, and that it can be killed at any moment."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_assets.artifacts import Artifact, ArtifactStore
from finetune_assets.errors import BadInput, StepFailed
from finetune_assets.export import ollama_store
from finetune_assets.lineage import NODES
from finetune_assets.retention import Collection, collect, reasons_to_stay, subjects
from finetune_assets.rollback import rollback
from tests.conftest import MiniProject, make_mini, rows
from tests.history_fixtures import make_chain, plan_of, store_of
from tests.test_cli import finetune
from tests.test_ollama_server import stand_in

Keys = set[tuple[str, str]]


def gc(mini: MiniProject, *names: str, keep: int = 0, dry_run: bool = False) -> Collection:
    store = store_of(mini)
    return collect(subjects(names, mini, store), mini, store, keep=keep, dry_run=dry_run)


def there(mini: MiniProject, name: str = "mini") -> Keys:
    return {(asset, item.fingerprint) for asset in NODES for item in store_of(mini).published(name, asset)}


def keys(artifacts: dict[str, Artifact]) -> Keys:
    return {(name, artifact.fingerprint) for name, artifact in artifacts.items()}


def gone(done: Collection) -> Keys:
    return {(item.path.parent.name, item.path.name) for item in done.removed if item.kind == "artifact"}


def reasons(done: Collection) -> dict[str, tuple[str, ...]]:
    return {item.artifact.fingerprint: item.reasons for item in done.kept}


def disk(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def three(mini: MiniProject) -> list[dict[str, Artifact]]:
    """Three learning rates, each with its own chain from the adapter on."""
    made = []
    for rate in (1e-3, 2e-3, 3e-3):
        mini.edit(train={"learning_rate": rate})
        made.append(make_chain(mini))
    return made


@pytest.mark.parametrize("keep", [0, 1, 2, 3])
def test_the_newest_and_what_they_are_made_of_stay(mini: MiniProject, three: list[dict[str, Artifact]], keep: int):
    done = gc(mini, keep=keep)
    expected = set().union(*map(keys, three[3 - max(keep, 1) :]))
    assert there(mini) == expected
    assert gone(done) == set().union(*map(keys, three)) - expected
    assert {item.state for item in plan_of(mini).values()} == {"fresh"}
    assert not gc(mini, keep=keep).removed


def test_what_the_recipe_asks_for_and_what_was_made_last(mini: MiniProject, three: list[dict[str, Artifact]]):
    mini.edit(train={"learning_rate": 1e-3})
    done = gc(mini)
    assert there(mini) == keys(three[0]) | keys(three[2])
    assert reasons(done)[three[0]["lora_adapter"].fingerprint][0] == "wanted by the recipe"
    assert reasons(done)[three[2]["lora_adapter"].fingerprint][0] == "current"
    assert reasons(done)[three[2]["ollama_model"].fingerprint] == ("current", "served as mini")
    assert [name for name, item in plan_of(mini).items() if item.state != "fresh"] == ["ollama_model"], "served"


def test_what_is_served_stays_with_all_that_it_is_made_of(mini: MiniProject, three: list[dict[str, Artifact]]):
    rollback("mini", mini, store_of(mini), lambda event: None)
    store_of(mini).make_current(three[2]["ollama_model"])
    gc(mini)
    # eval_metrics of the second chain went: nothing served is made of it
    assert there(mini) == keys(three[2]) | (keys(three[1]) - {("eval_metrics", three[1]["eval_metrics"].fingerprint)})
    assert rollback("mini", mini, store_of(mini), lambda event: None).fingerprint == (
        three[1]["ollama_model"].fingerprint
    )


def test_what_a_server_serves(mini: MiniProject, three: list[dict[str, Artifact]], monkeypatch: pytest.MonkeyPatch):
    digest = three[0]["ollama_model"].metrics["digest"]
    tags = {"models": [{"name": "mini:latest", "digest": digest}]}
    with stand_in({"/api/version": {"version": "1"}, "/api/tags": tags}) as host:
        monkeypatch.setenv("OLLAMA_HOST", host)
        done = gc(mini)
    assert keys(three[0]) - there(mini) == {("eval_metrics", three[0]["eval_metrics"].fingerprint)}
    assert reasons(done)[three[0]["ollama_model"].fingerprint] == ("served as mini",)
    with stand_in({}) as host:  # nobody knows what it serves
        monkeypatch.setenv("OLLAMA_HOST", host)
        done = gc(mini)
    assert reasons(done)[three[0]["ollama_model"].fingerprint] == ("the Ollama server cannot be asked",)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    gc(mini)
    assert there(mini) == keys(three[2])


def test_the_same_rows_from_another_snapshot(mini: MiniProject):
    """The adapter was trained on the first snapshot; the second has the same rows, and is the current one."""
    first = make_chain(mini)
    mini.write_rows(list(reversed(rows())), indent=1)
    second = make_chain(mini)
    assert second["lora_adapter"].fingerprint == first["lora_adapter"].fingerprint
    assert second["dataset_info"].fingerprint != first["dataset_info"].fingerprint
    done = gc(mini)
    assert not gone(done)
    assert reasons(done)[first["raw_dataset"].fingerprint] == (
        f"input of dataset_info {first['dataset_info'].fingerprint[:8]}",
    )


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
    """No manifest says yet what the build that is under way was given."""
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

    def waited(store: ArtifactStore, recipe: str, asset: str, fingerprint: str):
        store.remove(made["raw_dataset"])
        return building(store, recipe, asset, fingerprint)

    mini.edit(dataset={"test_size": 3})
    monkeypatch.setattr(ArtifactStore, "building", waited)
    with pytest.raises(
        StepFailed, match=f"raw_dataset {made['raw_dataset'].fingerprint} was removed meanwhile\nrun ag"
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


def test_a_dry_run_says_the_same_and_removes_nothing(mini: MiniProject, three: list[dict[str, Artifact]]):
    before = disk(mini.home)
    said = gc(mini, dry_run=True)
    assert disk(mini.home) == before
    done = gc(mini)
    assert said.removed and said == done
    sizes = {name: len(content) for name, content in before.items()}
    lost = set(sizes) - set(disk(mini.home))
    assert done.freed <= sum(sizes[name] for name in lost)


def test_a_file_of_several_names_is_freed_with_the_last(mini: MiniProject, three: list[dict[str, Artifact]]):
    """The served weights are linked into our Ollama store: the old ones go with their blob, and count once."""
    weights = [chain["gguf_file"].path / "mini-f16.gguf" for chain in three]
    assert [path.stat().st_nlink for path in weights] == [2, 2, 2]
    linked = mini.root / "by hand.gguf"
    linked.hardlink_to(weights[0])
    size = weights[0].stat().st_size
    done = gc(mini)
    uncounted = 2 * size + size
    assert sum(item.bytes for item in done.removed) - done.freed == uncounted, "the first stays, the second goes once"
    assert linked.stat().st_nlink == 1


def kill(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[None]:
    """Die at the n-th folder, with half its files deleted."""
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


def test_what_is_not_ours_is_reported_and_kept(mini: MiniProject, three: list[dict[str, Artifact]]):
    folder = store_of(mini).folder("mini", "merged_model")
    strange = {
        "notes.txt": "not an artifact",
        "empty": "it has no manifest",
        "foreign": "its manifest is not ours",
        "damaged": "its manifest cannot be read",
        "newer": "made by a later release",
    }
    for name in strange:
        (folder / name).write_text("x") if name == "notes.txt" else (folder / name).mkdir()
    (folder / "foreign" / "manifest.json").write_text('{"version": 1, "recipe": "other"}')
    (folder / "damaged" / "manifest.json").write_text("[")
    adapter = three[0]["lora_adapter"].fingerprint
    (folder / "newer" / "manifest.json").write_text(json.dumps({"version": 2, "inputs": {"lora_adapter": adapter}}))
    (mini.store / "mini" / "own_asset").mkdir()
    (mini.store / "lost+found").mkdir()
    done = gc(mini)
    assert {path.name: why for path, why in done.left_alone} == {**strange, "own_asset": "no asset's folder"}
    assert all((folder / name).exists() for name in strange)
    assert ("lora_adapter", adapter) in there(mini), "a later release made something of it"
    assert reasons(done)[adapter] == ("input of merged_model newer",)


def test_an_artifact_that_lies_elsewhere_stays(mini: MiniProject, three: list[dict[str, Artifact]]):
    path = three[0]["merged_model"].path
    path.rename(mini.root / "elsewhere")
    path.symlink_to(mini.root / "elsewhere")
    assert reasons(gc(mini))[path.name] == ("a symbolic link",)
    assert (path / "weights.json").is_file()


def test_a_recipe_that_is_gone(mini: MiniProject, three: list[dict[str, Artifact]]):
    mini.recipe_path().unlink()
    dead = store_of(mini).folder("mini", "raw_dataset") / ".staging-dead"
    dead.mkdir()
    before = there(mini)
    done = gc(mini)
    why = "there is no recipe mini any more: kept, unless named: finetune gc mini"
    assert done.left_alone == [(mini.store / "mini", why)]
    assert there(mini) == before
    assert not dead.exists(), "nobody builds there"
    gc(mini, "mini", keep=1)
    assert there(mini) == keys(three[2])
    gc(mini, "mini")
    served = keys(three[2]) - {("eval_metrics", three[2]["eval_metrics"].fingerprint)}
    assert there(mini) == served, "it is still served"
    shutil.rmtree(mini.ollama_models / "manifests")
    gc(mini, "mini")
    assert there(mini) == set()
    assert gc(mini).left_alone == []
    assert not list(mini.store.rglob("CURRENT"))


@pytest.mark.parametrize("broken", ["text", "source"])
def test_a_recipe_that_cannot_be_read(mini: MiniProject, three: list[dict[str, Artifact]], broken: str):
    if broken == "text":
        mini.recipe_path().write_text("dataset: {dataset: [facts]}\nmodell: 1\n")
    else:
        (mini.root / "data" / "facts.json").unlink()
    before = there(mini)
    done = gc(mini)
    assert there(mini) == before
    ((folder, why),) = done.left_alone
    assert folder == mini.store / "mini"
    assert ("missing" if broken == "text" else "no such file") in why and why.endswith("finetune gc mini")
    gc(mini, "mini")
    assert there(mini) == keys(three[2]), "what was made last stays"


def test_only_the_recipes_named(mini: MiniProject, three: list[dict[str, Artifact]]):
    mini.recipe_path("second").write_text(mini.recipe_path().read_text())
    old = keys(make_chain(mini, "second"))
    mini.edit("second", train={"learning_rate": 0.5}, ollama={"name": "second"})
    new = keys(make_chain(mini, "second"))
    before = there(mini)
    gc(mini, "second")
    assert there(mini) == before
    # the first was served as mini, and still is: both recipes gave their models this name
    assert there(mini, "second") == new | (old - {key for key in old if key[0] == "eval_metrics"})
    with pytest.raises(BadInput, match="unknown recipe 'third'"):
        gc(mini, "third")
    with pytest.raises(BadInput):
        gc(mini, "..")


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
    assert len(loose) == 3 + 2 + 2, "weights and configuration of the two models that were served before"
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
        assert len([item for item in gc(mini, dry_run=True).removed if item.kind == "blob"]) == 4


def test_a_store_that_cannot_be_written(mini: MiniProject, three, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    before = there(mini)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StepFailed, match="Permission denied; what is left is whole"):
        gc(mini)
    assert there(mini) == before


def test_nothing_was_made_yet(mini: MiniProject):
    done = gc(mini)
    assert (done.removed, done.kept, done.left_alone, done.freed) == ([], [], [], 0)
    assert not mini.store.exists()


def test_on_the_command_line(mini: MiniProject, three: list[dict[str, Artifact]]):
    plan = finetune(mini, "gc", "--keep", "1", "--dry-run")
    listed = json.loads(finetune(mini, "gc", "--keep", "1", "--dry-run", "--json").stdout)
    assert set(listed) == {"dry_run", "freed_bytes", "removed", "kept", "left_alone"}
    assert {(item["asset"], item["fingerprint"]) for item in listed["kept"]} == keys(three[2])
    assert {item["kind"] for item in listed["removed"]} == {"artifact", "blob"}
    assert there(mini) > keys(three[2])
    done = finetune(mini, "gc", "--keep", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:-1] == plan.stdout.splitlines()[:-1]
    assert plan.stdout.splitlines()[-1].replace("would free", "freed") == done.stdout.splitlines()[-1]
    assert "10 artifacts, 4 blobs" in done.stdout.splitlines()[-1]
    assert there(mini) == keys(three[2])
    assert finetune(mini, "gc").stdout.splitlines()[-1] == "freed 0 B: nothing to remove"
    done = finetune(mini, "gc", "minni")
    assert done.returncode == 2 and "did you mean 'mini'?" in done.stderr
    assert finetune(mini, "gc", "--keep", "-1").returncode == 2


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Artifact], dict[tuple[str, str], list[str]], int]:
    """Any artifacts made of any earlier ones, any of them needed by someone."""
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
    """Edits, runs, collections of any order: what is on disk always has its inputs, and the plan can go on from it."""
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
