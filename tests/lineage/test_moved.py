"""A project that was moved or copied: no file names the old folder, and all output names the new one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_assets.assets.all_assets import STEPS
from finetune_assets.assets.base_model import BASE_MODEL
from finetune_assets.assets.step_asset import page
from finetune_assets.export.ollama.publish import OWN_STORE
from finetune_assets.export.ollama.server.api import show
from finetune_assets.export.ollama.server.temporary import find_binary, serving
from finetune_assets.lineage.materialise import materialise
from finetune_assets.recipe.file import load_recipe
from finetune_assets.store.artifact import Artifact
from tests.cli.test_cli import finetune
from tests.conftest import MiniProject
from tests.models.test_base_model import folder_model
from tests.support.history_fixtures import make_chain, plan_of, store_of
from tests.support.ollama.fixtures import Files, needs_server, tiny_files, with_weights


def move(old: Path, new: Path) -> None:
    old.rename(new)


def copy(old: Path, new: Path) -> None:
    """A plain copy, hard links gone; the old one is unusable from then on."""
    shutil.copytree(old, new)
    old.rename(old.with_name("not there any more"))


def holding(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.fixture(params=[move, copy], ids=["moved", "copied"])
def moved(mini: MiniProject, request: pytest.FixtureRequest) -> MiniProject:
    """A project with two models, of two system prompts, that is somewhere else now."""
    (mini.root / "base").mkdir()
    mini.edit(ollama={"system": "One."})
    make_chain(mini)
    mini.edit(ollama={"system": "Two."})
    made = make_chain(mini)
    assert made["ollama_model"].metrics["place"] == OWN_STORE
    change: Callable[[Path, Path], None] = request.param
    new = mini.root.with_name("elsewhere")
    change(mini.root, new)
    return MiniProject(new, new / "dagster_home")


def test_all_is_fresh_and_all_that_is_printed_is_the_new_place(moved: MiniProject):
    old = str(moved.root.with_name("project"))
    assert not holding(moved.store, old) and not holding(moved.home / "ollama", old)
    assert {item.state for item in plan_of(moved).values()} == {"fresh"}
    serve = f"OLLAMA_MODELS={moved.ollama_models} ollama serve"
    said = {}
    for command in ("artifacts mini", "plan mini", "explain mini/ollama_model", "verify mini", "gc --dry-run",
                    "gc --dry-run --json", "rollback mini"):  # fmt: skip
        done = finetune(moved, *command.split())
        assert done.returncode == 0, done.stderr
        said[command] = "".join(done.stdout.split("\n"))
        assert old not in said[command] + done.stderr, command
    assert serve in said["artifacts mini"]
    assert f"served from the store {moved.ollama_models}" in said["rollback mini"]
    assert str(moved.store) in said["gc --dry-run --json"]
    assert "checks, all good" in said["verify mini"]
    assert not holding(moved.store, old), "nor in what a roll-back writes"


def test_pages_of_a_moved_project(moved: MiniProject):
    served = store_of(moved).current("mini", "ollama_model")
    assert served is not None
    recipe = load_recipe(moved.recipe_path())
    shown = str(page(STEPS[-1], served, recipe, moved, reused=True))
    weights = store_of(moved).folder("mini", "gguf_file") / served.inputs["gguf_file"] / "mini-f16.gguf"
    assert f"FROM {weights}" in shown and str(moved.ollama_models) in shown
    assert str(moved.root.with_name("project")) not in shown


def as_before(made: Artifact, mini: MiniProject) -> None:
    """Make a manifest one of an earlier release, which recorded where things were."""
    weights = made.path.parent.parent / "gguf_file" / made.inputs["gguf_file"]
    facts = {
        **made.metrics,
        "place": str(mini.ollama_models),
        "modelfile": made.metrics["modelfile"].replace(f"FROM ../../gguf_file/{weights.name}", f"FROM {weights}"),
    }
    (made.path / "manifest.json").write_text(json.dumps({**made.manifest, "metrics": facts}))


def test_an_absolute_place_of_an_earlier_release(mini: MiniProject):
    as_before(make_chain(mini)["ollama_model"], mini)
    new = mini.root.with_name("elsewhere")
    mini.root.rename(new)
    moved = MiniProject(new, new / "dagster_home")
    assert {item.state for item in plan_of(moved).values()} == {"fresh"}
    for command in ("artifacts mini", "explain mini/ollama_model", "verify mini"):
        done = finetune(moved, *command.split())
        assert done.returncode == 0 and str(mini.root) not in "".join(done.stdout.split("\n")), command
    served = store_of(moved).current("mini", "ollama_model")
    assert served is not None and served.metrics["place"] == str(mini.ollama_models)
    shown = page(STEPS[-1], served, load_recipe(moved.recipe_path()), moved, reused=True)
    assert str(mini.root) not in str(shown)


def test_the_source_of_a_base_model_is_where_the_recipe_says(mini: MiniProject):
    folder_model(mini.root / "base")
    recipe = load_recipe(mini.recipe_path())
    made = materialise("base_model", recipe, mini, BASE_MODEL.build, lambda event: None).artifact
    assert made.metrics["source"] == "base"
    outside = folder_model(mini.root.parent / "outside")
    mini.edit(model={"model_name_or_path": str(outside)})
    recipe = load_recipe(mini.recipe_path())
    made = materialise("base_model", recipe, mini, BASE_MODEL.build, lambda event: None).artifact
    assert made.metrics["source"] == str(outside)


def test_a_base_with_a_manifest_of_ours(mini: MiniProject):
    """A merged model taken as the next base: its manifest, which a roll-back may amend, is no part of the model."""
    base = folder_model(mini.root / "base", **{"chat.json": "{}", "chat_template.jinja": "t", "manifest.json": "{}"})
    recipe = load_recipe(mini.recipe_path())

    def made() -> Artifact:
        return materialise("base_model", recipe, mini, BASE_MODEL.build, lambda event: None).artifact

    first = made()
    assert first.damage(store_of(mini).digests) is None
    assert {"chat.json", "chat_template.jinja"} < set(first.manifest["files"]) and first.manifest[
        "asset"
    ] == "base_model"
    (base / "manifest.json").write_text('{"created": "another day"}')
    assert plan_of(mini)["base_model"].state == "fresh"
    again = made()
    assert (again.fingerprint, again.data_version) == (first.fingerprint, first.data_version)
    (base / "manifest.json").unlink()
    assert made().data_version == first.data_version, "the same without it"


@pytest.fixture(scope="module")
def files(smollm2: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Files:
    return tiny_files(smollm2, tmp_path_factory, request.config)


@needs_server
def test_a_real_ollama_reads_the_modelfile_wherever_it_is(
    mini: MiniProject, files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """FROM is relative to the Modelfile, so `ollama create -f` works from any folder, after a move, too."""
    with_weights(mini, files, monkeypatch)
    mini.edit(gguf={"types": ["f32", "q8_0"]}, ollama={"types": ["q8_0"], "system": "Be brief.", "num_ctx": 256})
    made = make_chain(mini)["ollama_model"]
    new = mini.root.with_name("else where")
    mini.root.rename(new)
    folder = new / made.path.relative_to(mini.root)
    assert (folder / "Modelfile").read_text().startswith("FROM ../../gguf_file/")
    with serving(tmp_path / "models") as host:
        environment = {**os.environ, "OLLAMA_HOST": host, "HOME": str(tmp_path)}
        for number, (cwd, file, weights) in enumerate(
            [(tmp_path, folder / "Modelfile", files.f32), (folder, Path("Modelfile.q8_0"), files.q8_0)]
        ):
            command = [str(find_binary()), "create", f"again{number}", "-f", str(file)]
            done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            told = show(host, f"again{number}")
            assert told["template"] == made.metrics["template"] and told["system"] == "Be brief."
            assert any(
                path.stat().st_size == weights.stat().st_size for path in (tmp_path / "models").rglob("sha256-*")
            )
