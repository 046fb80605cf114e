"""`finetune gc`: what it keeps, what it removes, and what it prints."""

from __future__ import annotations

import json
import shutil

import pytest

from finetune_assets.export.ollama.rollback import rollback
from finetune_assets.reporting.errors import BadInput
from finetune_assets.store.artifact import Artifact
from tests.cli.test_cli import finetune
from tests.conftest import MiniProject, rows
from tests.support.history_fixtures import make_chain, plan_of, store_of
from tests.support.retention_fixtures import disk, gc, gone, keys, reasons, there, three_rates
from tests.support.servers.fixed_answers import stand_in


@pytest.fixture
def three(mini: MiniProject) -> list[dict[str, Artifact]]:
    return three_rates(mini)


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
    assert reasons(done)[three[0]["ollama_model"].fingerprint] == ("the Ollama server cannot be queried",)
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


def test_what_is_not_ours_is_reported_and_kept(mini: MiniProject, three: list[dict[str, Artifact]]):
    folder = store_of(mini).folder("mini", "merged_model")
    strange = {
        "notes.txt": "not an artifact",
        "empty": "it has no manifest",
        "foreign": "its manifest is foreign",
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
    assert {path.name: why for path, why in done.left_alone} == {**strange, "own_asset": "not an asset's folder"}
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
    why = "the recipe mini no longer exists; to collect it, name it: finetune gc mini"
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
    assert "10 artifacts, 2 blobs" in done.stdout.splitlines()[-1]
    assert there(mini) == keys(three[2])
    assert finetune(mini, "gc").stdout.splitlines()[-1] == "freed 0 B: nothing to remove"
    done = finetune(mini, "gc", "minni")
    assert done.returncode == 2 and "did you mean 'mini'?" in done.stderr
    assert finetune(mini, "gc", "--keep", "-1").returncode == 2
