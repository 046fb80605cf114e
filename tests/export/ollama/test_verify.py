"""`finetune verify`: what is served now against the record; tags for types. See test_battery, too."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from finetune_assets.cli.verification import all_good, print_verification, verification_json
from finetune_assets.export.ollama import model_store as ollama_store
from finetune_assets.export.ollama.rollback import rollback
from finetune_assets.export.ollama.served_checks import Check
from finetune_assets.export.ollama.server.api import digests
from finetune_assets.export.ollama.server.temporary import serving
from finetune_assets.export.ollama.verify import verify
from finetune_assets.lineage.retention import collect, subjects
from finetune_assets.recipe.file import load_recipe
from finetune_assets.reporting.errors import BadInput, StepFailed
from finetune_assets.store.artifact import Artifact
from tests.conftest import MiniProject
from tests.support.history_fixtures import make_chain, plan_of, store_of
from tests.support.ollama.fixtures import needs_server, tiny_files, with_weights

Found = dict[str, list[Check]]


def look(mini: MiniProject) -> Found:
    return verify("mini", mini, store_of(mini), lambda event: None)


def failed(found: Found) -> dict[str, str]:
    return {check.name: check.found for checks in found.values() for check in checks if not check.ok}


def in_place(mini: MiniProject) -> dict[str, str | None]:
    names = ("mini:latest", "mini:f16", "mini:q8_0", "mini:f32")
    found = {name: ollama_store.read(mini.ollama_models, name) for name in names}
    return {name: digest for name, digest in found.items() if digest is not None}


@pytest.fixture
def made(mini: MiniProject) -> Artifact:
    """Two types in our own store."""
    mini.edit(gguf={"types": ["f16", "q8_0"]}, ollama={"types": ["q8_0"], "system": "Be brief.", "top_k": 3})
    return make_chain(mini)["ollama_model"]


def test_all_is_good(mini: MiniProject, made: Artifact):
    found = look(mini)
    assert list(found) == [
        "mini: the record",
        f"mini:latest in the store {mini.ollama_models}",
        f"mini:q8_0 in the store {mini.ollama_models}",
    ]
    names = ["manifest", "blobs", "weights", "template", "system", "params"]
    assert [check.name for check in list(found.values())[1]] == names
    assert all_good(found)
    out = io.StringIO()
    print_verification(Console(file=out, width=200), found)
    assert out.getvalue().splitlines()[-1] == "14 checks, all good"
    described = verification_json(found)
    assert len(described) == 14 and all(entry["ok"] for entry in described)


def test_a_model_that_is_gone_or_another(mini: MiniProject, made: Artifact):
    shutil.copyfile(*(ollama_store.manifest_path(mini.ollama_models, f"mini:{tag}") for tag in ("q8_0", "latest")))
    found = look(mini)
    assert set(failed(found)) == {"manifest", "weights"}
    out = io.StringIO()
    print_verification(Console(file=out, width=200), found)
    assert out.getvalue().splitlines()[-1] == "2 of 14 checks failed"
    ollama_store.remove(mini.ollama_models, "mini:q8_0")
    assert failed(look(mini))["manifest"].endswith("mini/q8_0 is not there")
    ollama_store.manifest_path(mini.ollama_models, "mini").write_text("{")
    assert (
        "cannot be read" in failed({"first": look(mini)[f"mini:latest in the store {mini.ollama_models}"]})["manifest"]
    )
    make_chain(mini)
    assert all_good(look(mini))


def test_weights_that_are_gone(mini: MiniProject, made: Artifact):
    gguf = store_of(mini).get("mini", "gguf_file", made.inputs["gguf_file"])
    assert gguf is not None
    (gguf.path / "mini-f16.gguf").unlink()
    assert failed(look(mini)) == {f"gguf_file {gguf.fingerprint}": "mini-f16.gguf is gone"}
    store_of(mini).remove(gguf)
    assert failed(look(mini)) == {f"gguf_file {gguf.fingerprint}": "it is gone"}


def test_nothing_to_verify(mini: MiniProject):
    with pytest.raises(StepFailed, match="mini/ollama_model has not been made yet\nfinetune run mini"):
        look(mini)


def test_a_record_of_an_earlier_release(mini: MiniProject, made: Artifact):
    kept = ("name", "digest", "where", "place", "template", "system", "parameters")
    store_of(mini).amend(made, {key: made.metrics[key] for key in kept})
    with pytest.raises(StepFailed, match="published by an earlier release, which did not record its models"):
        look(mini)
    assert plan_of(mini)["ollama_model"].state == "fresh", "the plain name is on record"


def test_types_have_names_of_their_own(mini: MiniProject, made: Artifact):
    assert in_place(mini) == made.metrics["digests"]
    assert list(made.metrics["digests"]) == ["mini:latest", "mini:q8_0"]
    assert made.metrics["previous"] == {"mini:latest": None, "mini:q8_0": None}
    assert (made.path / "Modelfile").read_text().startswith("FROM ") and "q8_0" not in (
        made.path / "Modelfile"
    ).read_text()
    assert "mini-q8_0.gguf" in (made.path / "Modelfile.q8_0").read_text().splitlines()[0]
    # another type that is not served leaves it alone; one that is changes it
    mini.edit(gguf={"types": ["f16", "q8_0", "f32"]})
    gguf = make_chain(mini)
    assert gguf["ollama_model"].fingerprint == made.fingerprint
    mini.edit(ollama={"types": ["f32"]})
    after = make_chain(mini)["ollama_model"]
    assert in_place(mini) == after.metrics["digests"] and "mini:q8_0" not in in_place(mini), "no tag is left behind"
    assert after.metrics["previous"] == {"mini:latest": made.metrics["digest"], "mini:f32": None}
    back = rollback("mini", mini, store_of(mini), lambda event: None)
    assert back.fingerprint == made.fingerprint
    assert in_place(mini) == made.metrics["digests"]
    assert all_good(look(mini))


def test_every_tag_counts(mini: MiniProject, made: Artifact):
    ollama_store.remove(mini.ollama_models, "mini:q8_0")
    assert plan_of(mini)["ollama_model"].reasons == (f"the Ollama store {mini.ollama_models} has no model mini:q8_0",)
    make_chain(mini)
    # what is served under any of its names stays
    mini.edit(ollama={"types": None, "system": "Another"})
    store = store_of(mini)
    manifest = ollama_store.manifest_path(mini.ollama_models, "mini:q8_0").read_bytes()
    newest = make_chain(mini)["ollama_model"]
    ollama_store.manifest_path(mini.ollama_models, "mini:q8_0").write_bytes(manifest)
    done = collect(subjects([], mini, store), mini, store, keep=0, dry_run=True)
    reasons = {item.artifact.fingerprint: item.reasons for item in done.kept}
    assert reasons[made.fingerprint] == ("served as mini:q8_0",)
    assert "served as mini" in reasons[newest.fingerprint]


@pytest.mark.parametrize(
    ("types", "words"),
    [(["q8_O"], "ollama.types: 'q8_O' is not among gguf.types; did you mean 'q8_0'?"), (["f32"], "known: f16, q8_0")],
)
def test_types_that_are_not_made(mini: MiniProject, types: list[str], words: str):
    mini.edit(gguf={"types": ["f16", "q8_0"]}, ollama={"types": types})
    with pytest.raises(BadInput) as caught:
        load_recipe(mini.recipe_path())
    assert words in str(caught.value)


@pytest.fixture
def real(
    mini: MiniProject,
    smollm2: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    """Weights that an engine can run, two types of them, and a server that answers."""
    with_weights(mini, tiny_files(smollm2, tmp_path_factory, request.config), monkeypatch)
    mini.edit(gguf={"types": ["f32", "q8_0"]}, ollama={"types": ["q8_0"], "system": "Be brief.", "num_ctx": 256})
    with serving(tmp_path_factory.mktemp("models")) as host:
        monkeypatch.setenv("OLLAMA_HOST", host)
        yield host


@needs_server
def test_on_a_real_server(mini: MiniProject, real: str, monkeypatch: pytest.MonkeyPatch):
    from ollama import Client

    client = Client(host=real, trust_env=False)
    first = make_chain(mini)["ollama_model"]
    assert digests(real) == first.metrics["digests"]
    found = look(mini)
    assert list(found)[1:] == [f"mini:latest on the server {real}", f"mini:q8_0 on the server {real}"]
    names = ["weights", "template", "system", "stops", "parameters", "prompt tokens", "first tokens", "stops by itself"]
    assert [check.name for check in found[f"mini:latest on the server {real}"]] == ["digest", "served by", *names]
    assert first.metrics["served"]["mini:latest"]["by"] == "Ollama 0.9.3: prompts by TEMPLATE, weights as sent"
    assert all_good(found)
    # someone else's hand
    client.copy("mini:q8_0", "mini:latest")
    assert set(failed(look(mini))) == {"digest", "weights"}
    client.delete("mini:q8_0")
    assert failed({"q8_0": look(mini)[f"mini:q8_0 on the server {real}"]}) == {"digest": "no such model"}
    # the next run puts both back; the one after takes away what is not wanted
    assert make_chain(mini)["ollama_model"].fingerprint == first.fingerprint
    assert all_good(look(mini))
    mini.edit(ollama={"types": None, "system": "Be long."})
    second = make_chain(mini)["ollama_model"]
    assert digests(real) == second.metrics["digests"] and list(second.metrics["digests"]) == ["mini:latest"]
    assert second.metrics["previous"] == {"mini:latest": first.metrics["digests"]["mini:latest"]}
    rollback("mini", mini, store_of(mini), lambda event: None)
    assert digests(real) == first.metrics["digests"] and all_good(look(mini))
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    assert failed(look(mini)) == {
        "server": f"no server answers; the models are on {real}: start that server, or set OLLAMA_HOST to it"
    }


@needs_server
def test_a_server_over_our_own_store(mini: MiniProject, real: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    made = make_chain(mini)["ollama_model"]
    assert made.metrics["where"] == "store"
    with serving(mini.ollama_models) as host:
        monkeypatch.setenv("OLLAMA_HOST", host)
        found = look(mini)
    assert [subject.partition(" ")[2].split(" /")[0].split(" http")[0] for subject in found] == [
        *("the record", "in the store", "in the store", "on the server", "on the server")
    ]
    assert all_good(found)
    monkeypatch.setenv("OLLAMA_HOST", real)
    assert set(failed(look(mini)).values()) == {"no such model"}, "a server that answers is what serves"
