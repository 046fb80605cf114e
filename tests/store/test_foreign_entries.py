"""Foreign entries in the store: reported, counted as missing, never deleted. And clocks that are set back."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from finetune_assets.export.ollama.rollback import rollback
from finetune_assets.lineage.retention import collect, subjects
from finetune_assets.store import artifact_store as artifacts
from finetune_assets.store.artifact import Artifact
from tests.conftest import MiniProject
from tests.support.history_fixtures import make_chain, plan_of, store_of

FOREIGN = {
    "{}": "its manifest is foreign",
    "[]": "its manifest is foreign",
    "not json": "its manifest cannot be read",
    "[" * 100_000: "its manifest cannot be read",
    '{"version": 99, "inputs": {"raw_dataset": "abc"}}': "made by a later release",
    "": "its manifest cannot be read",
}


def left_alone(mini: MiniProject, keep: int = 0) -> dict[str, str]:
    store = store_of(mini)
    done = collect(subjects([], mini, store), mini, store, keep=keep, dry_run=False)
    return {path.name: why for path, why in done.left_alone}


@pytest.mark.parametrize(("text", "why"), FOREIGN.items(), ids=range(len(FOREIGN)))
def test_a_foreign_manifest(mini: MiniProject, text: str, why: str):
    """The plan reports it, a run sets it aside, and no build, run or collection deletes it."""
    first = make_chain(mini)["merged_model"]
    (first.path / "manifest.json").write_text(text)
    (first.path / "precious").write_text("kept")
    found = plan_of(mini)["merged_model"]
    assert found.state == "missing"
    assert found.reasons == (f"{first.fingerprint} exists, but {why}: it will be set aside",)
    assert left_alone(mini) == {first.path.name: why, "CURRENT": f"{first.fingerprint}: {why}"}
    assert make_chain(mini)["merged_model"].manifest["files"] == first.manifest["files"]
    assert {item.state for item in plan_of(mini).values()} == {"fresh"}
    aside = first.path.with_name(f"set-aside-{first.fingerprint}")
    with store_of(mini).building("mini", "merged_model", "abc"):
        pass
    assert left_alone(mini) == {aside.name: why}
    assert (aside / "manifest.json").read_text() == text and (aside / "precious").read_text() == "kept"


def test_one_foreign_entry_after_the_other(mini: MiniProject):
    made = make_chain(mini)["merged_model"]
    for number in range(3):
        (made.path / "manifest.json").write_text(f'{{"number": {number}}}')
        make_chain(mini)
    found = sorted(made.path.parent.glob("set-aside-*"))
    assert [(path / "manifest.json").read_text() for path in found] == [f'{{"number": {n}}}' for n in range(3)]
    made.path.rename(made.path.with_name("moved"))
    made.path.write_text("a file")
    assert "not an artifact" in plan_of(mini)["merged_model"].reasons[0]
    make_chain(mini)
    assert made.path.with_name(f"set-aside-{made.fingerprint}-4").read_text() == "a file"


@pytest.mark.parametrize("key", ["ingredients", "data_version", "parts", "files", "metrics", "inputs", "created"])
def test_a_manifest_that_lacks_something(mini: MiniProject, key: str):
    made = make_chain(mini)["dataset_info"]
    for broken in ({name: value for name, value in made.manifest.items() if name != key}, {**made.manifest, key: 3}):
        (made.path / "manifest.json").write_text(json.dumps(broken))
        assert store_of(mini).get("mini", "dataset_info", made.fingerprint) is None
        assert f"its manifest is damaged: no {key}" in plan_of(mini)["dataset_info"].reasons[0]


def test_the_current_one_of_a_later_release(mini: MiniProject):
    """A different artifact is wanted, so nothing is set aside; the plan reports the last one as unusable."""
    made = make_chain(mini)["lora_adapter"]
    (made.path / "manifest.json").write_text('{"version": 2}')
    mini.edit(train={"learning_rate": 0.5})
    found = plan_of(mini)["lora_adapter"]
    assert (found.state, found.reasons) == (
        "missing",
        (f"the last artifact is unusable ({made.fingerprint}: made by a later release)",),
    )
    make_chain(mini)
    assert (made.path / "manifest.json").read_text() == '{"version": 2}'
    shutil.rmtree(make_chain(mini)["lora_adapter"].path)
    assert "it is gone" in plan_of(mini)["lora_adapter"].reasons[0]


@pytest.mark.parametrize("content", [b'{"current": "abc"}', b"\xff\xfe", b"../../elsewhere", b"", b"abc\ndef"])
def test_a_foreign_pointer(mini: MiniProject, content: bytes):
    made = make_chain(mini)
    pointer = made["lora_adapter"].path.parent / "CURRENT"
    pointer.write_bytes(content)
    assert plan_of(mini)["lora_adapter"].state == "fresh", "it is there, whatever the pointer says"
    assert left_alone(mini) == {"CURRENT": "CURRENT is foreign"}
    mini.edit(train={"learning_rate": 0.5})
    assert plan_of(mini)["lora_adapter"].reasons == ("the last artifact is unusable (CURRENT is foreign)",)
    now = make_chain(mini)["lora_adapter"]
    assert pointer.read_text() == f"{now.fingerprint}\n"
    assert left_alone(mini, keep=9) == {"set-aside-CURRENT": "not an artifact"}
    assert pointer.with_name("set-aside-CURRENT").read_bytes() == content
    store_of(mini).remove(now)
    assert not pointer.exists()


def test_a_damaged_artifact_is_replaced_and_not_kept(mini: MiniProject):
    made = make_chain(mini)["dataset_info"]
    (made.path / "train.jsonl").write_text("damaged")
    make_chain(mini)
    assert {path.name for path in made.path.parent.iterdir()} == {".lock", "CURRENT", made.fingerprint}


def test_a_link_in_the_place_of_an_artifact(mini: MiniProject):
    """The artifact was moved to a different disk: neither a build nor a sweep deletes the target of the link."""
    made = make_chain(mini)["dataset_info"]
    elsewhere = mini.root / "elsewhere"
    made.path.rename(elsewhere)
    made.path.symlink_to(elsewhere)
    (elsewhere / "train.jsonl").write_text("damaged")
    made.path.with_name(".staging-replaced-abc").symlink_to(elsewhere)
    left_alone(mini)
    make_chain(mini)
    assert not made.path.is_symlink() and (elsewhere / "train.jsonl").read_text() == "damaged"
    assert {path.name for path in made.path.parent.iterdir()} == {".lock", "CURRENT", made.fingerprint}


class Clock(datetime):
    """A clock that goes back an hour at each reading."""

    present = datetime(2030, 1, 1, tzinfo=UTC)

    @classmethod
    def now(cls, tz: object = None) -> datetime:
        Clock.present -= timedelta(hours=1)
        return Clock.present


def models(mini: MiniProject, count: int) -> list[Artifact]:
    made = []
    for number in range(count):
        mini.edit(ollama={"system": f"Number {number}."})
        made.append(make_chain(mini)["ollama_model"])
    return made


def test_a_clock_that_goes_back(mini: MiniProject, monkeypatch: pytest.MonkeyPatch):
    """Later publications get later dates, which gc (the newest) and rollback (the one before) rely on."""
    monkeypatch.setattr(artifacts, "datetime", Clock)
    made = models(mini, 4)
    dates = [item.created for item in made]
    assert dates == sorted(set(dates)) and dates[0].startswith("2029-12-31")
    assert store_of(mini).published("mini", "ollama_model") == made
    back = rollback("mini", mini, store_of(mini), lambda event: None)
    assert back.fingerprint == made[2].fingerprint
    store_of(mini).make_current(made[3])
    store = store_of(mini)
    collect(subjects([], mini, store), mini, store, keep=2, dry_run=False)
    assert [item.fingerprint for item in store.published("mini", "ollama_model")] == [
        item.fingerprint for item in made[2:]
    ]


def test_the_same_moment_twice(mini: MiniProject, monkeypatch: pytest.MonkeyPatch):
    class Still(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime(2030, 1, 1, microsecond=999, tzinfo=UTC)

    monkeypatch.setattr(artifacts, "datetime", Still)
    assert [item.created[17:23] for item in models(mini, 3)] == ["00.000", "00.001", "00.002"]


def test_what_is_published_is_dated_by_the_store(mini: MiniProject):
    before = datetime.now(UTC) - timedelta(seconds=1)
    for artifact in make_chain(mini).values():
        assert before <= datetime.fromisoformat(artifact.created) <= datetime.now(UTC)
        assert Path(artifact.path, "manifest.json").read_text().count('"created"') == 1
