"""Which GGUF files are made again because of an importance matrix, and which are kept."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from finetune_assets.assets import gguf_file
from finetune_assets.export.gguf import converter
from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.materialise import Step, materialise
from finetune_assets.lineage.plan import open_store
from finetune_assets.models.formats.gguf import read_head
from finetune_assets.recipe.file import load_recipe
from finetune_assets.reporting.events import Event, Progress
from finetune_assets.store.artifact import Artifact, Made
from finetune_assets.worker.tasks.task import Task
from tests.conftest import MiniProject, make_mini, rows
from tests.support.export_fixtures import converter_cache
from tests.support.history_fixtures import BODIES

pytestmark = pytest.mark.usefixtures("one_thread_each")


class Exports:
    """A project whose merged model is a given one; its GGUF files are made and proven for real."""

    def __init__(self, project: MiniProject, merged: Path):
        self.project = project
        self.tasks: list[str] = []
        self.said: list[str] = []

        def merge(step: Step) -> Made:
            shutil.copytree(merged, step.staging, dirs_exist_ok=True)
            return Made({"check": {"kl_from_base": 1e-6}})

        self.bodies = {**BODIES, "merged_model": merge, "gguf_file": gguf_file.build}

    def hear(self, event: Event) -> None:
        self.said.append(event.as_json().get("text", ""))

    def launch(self, task: Task, progress: Progress) -> dict[str, Any]:
        self.tasks.append(task.task)
        return task.model_copy(update={"device": "cpu"}).run(progress)

    def make(self, **gguf: Any) -> Artifact:
        """Bring everything up to gguf_file up to date."""
        self.project.edit(gguf=gguf)
        self.tasks.clear()
        self.said.clear()
        made = None
        for asset in list(NODES)[: list(NODES).index("gguf_file") + 1]:
            recipe = load_recipe(self.project.recipe_path())
            body = self.bodies[asset]
            made = materialise(asset, recipe, self.project, body, self.hear, launch=self.launch).artifact
        assert made is not None
        return made

    def splits(self) -> Mapping[str, str]:
        """The version of each split of the data."""
        data = open_store(self.project).current("mini", "dataset_info")
        assert data is not None
        return data.manifest["parts"]


@pytest.fixture
def exports(tmp_path: Path, merged: Path, request: pytest.FixtureRequest) -> Exports:
    project = make_mini(tmp_path)
    project.edit(dataset={"val_size": 2})
    project.cache.mkdir(parents=True)
    project.empty_base()
    (project.cache / f"{converter.PACKAGE}-{converter.VERSION}").symlink_to(
        converter.converter_dir(converter_cache(request.config))
    )
    return Exports(project, merged)


def inodes(artifact: Artifact) -> dict[str, int]:
    return {path.name.removeprefix("mini-"): path.stat().st_ino for path in artifact.path.glob("*.gguf")}


def told(artifact: Artifact, kind: str) -> Mapping[str, Any]:
    head = read_head(artifact.path / f"mini-{kind}.gguf")
    return {key.rpartition(".")[2]: head.get(key) for key in head.raw if key.startswith("quantize.imatrix.")}


def test_what_is_made_again_and_what_is_kept(exports: Exports) -> None:
    plain = exports.make(types=["f32", "q8_0", "q4_0"])
    assert exports.tasks == ["prove"] and "imatrix" not in plain.metrics and told(plain, "q4_0") == {}
    assert "gguf.imatrix" not in plain.manifest["ingredients"]["recipe"]
    assert plain.manifest["ingredients"]["upstreams"].keys() == {"merged_model", "dataset_info/test"}

    weighed = exports.make(imatrix="train")
    assert exports.tasks == ["imatrix", "prove"]
    before, after = inodes(plain), inodes(weighed)
    assert after.keys() - before.keys() == {"imatrix.gguf"}
    kept = {name for name in before if before[name] == after[name]}
    assert kept == {"f32.gguf", "q8_0.gguf"}, "linked, not made again"
    assert told(weighed, "q4_0") == {
        "file": "imatrix.gguf", "dataset": "train.jsonl", "entries_count": 14, "chunks_count": 8,
    }  # fmt: skip
    assert told(weighed, "q8_0") == {}
    content = [(artifact.path / "mini-q4_0.gguf").read_bytes() for artifact in (plain, weighed)]
    assert content[0] != content[1]
    assert weighed.metrics["types"]["f32"] == plain.metrics["types"]["f32"], "nor measured again"
    assert [text for text in exports.said if text.startswith("proving")] == ["proving q4_0 (3 of 3)"]
    assert any(text.startswith("q4_0: its quantisation error (") for text in exports.said)
    facts = weighed.metrics["imatrix"]
    assert facts | {"tokens": 0} == {
        "rows": "train", "conversations": 8, "tokens": 0, "entries": 14, "unused_experts": 0,
        "without": ["output.weight", "token_embd.weight"],
    }  # fmt: skip
    assert weighed.manifest["files"].keys() >= {"imatrix.gguf", "mini-q4_0.gguf"}
    table = gguf_file.describe(weighed)["weights weighed by"]
    assert isinstance(table, dg.TableMetadataValue)
    (row,) = table.records
    assert row.data["tokens"] == facts["tokens"] > 100 and row.data["without"] == "2: output.weight, token_embd.weight"

    more = exports.make(types=["f32", "q4_0", "q5_1"])
    assert exports.tasks == ["prove"], "the matrix is there"
    assert {name: inode for name, inode in inodes(more).items() if name != "q5_1.gguf"} == {
        name: inode for name, inode in after.items() if name != "q8_0.gguf"
    }
    assert told(more, "q5_1") == told(weighed, "q4_0") and more.metrics["imatrix"] == facts

    other = exports.make(imatrix="validation")
    assert exports.tasks == ["imatrix", "prove"] and told(other, "q4_0")["dataset"] == "validation.jsonl"
    assert {name for name in inodes(more) if inodes(more)[name] == inodes(other)[name]} == {"f32.gguf"}

    unneeded = exports.make(types=["f32", "q8_0"])
    assert exports.tasks == ["prove"] and "imatrix" not in unneeded.metrics and len(inodes(unneeded)) == 2

    assert exports.make(types=["f32", "q8_0", "q4_0"], imatrix=None).fingerprint == plain.fingerprint
    assert exports.tasks == []


def test_rows_count_only_where_they_are_read(exports: Exports) -> None:
    off = exports.make(types=["f32", "q4_0"])
    before, here = exports.splits(), rows()
    # one more to learn from, with the others split as they were
    for number in range(20):
        more = {"instruction": f"Say the word {number}.", "input": "", "output": f"Word {number}.", "history": []}
        exports.project.write_rows([*here, more])
        exports.make()
        after = exports.splits()
        if [before[name] == after[name] for name in ("train", "validation", "test")] == [False, True, True]:
            break
    else:
        pytest.fail("no row came into train alone")
    assert exports.make() == off, "the merged model came out as it was, and nothing else is read"
    on = exports.make(imatrix="train")
    exports.project.write_rows(here)
    again = exports.make()
    assert exports.tasks == ["imatrix", "prove"]
    assert inodes(again)["imatrix.gguf"] != inodes(on)["imatrix.gguf"]
    assert again.part_version("q4_0") != on.part_version("q4_0")
