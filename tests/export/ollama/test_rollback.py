"""Serving an earlier model again: the same bytes, on record, and the plan says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finetune_assets.export.gguf import converter
from finetune_assets.export.ollama import model_store as ollama_store
from finetune_assets.export.ollama import publish as serving
from finetune_assets.export.ollama.rollback import rollback
from finetune_assets.export.ollama.server.api import digest, show
from finetune_assets.export.ollama.server.temporary import find_binary
from finetune_assets.export.ollama.server.temporary import serving as running
from finetune_assets.lineage.materialise import Step
from finetune_assets.reporting.errors import BadInput, StepFailed
from finetune_assets.store.artifact import Artifact, Made
from tests.cli.test_cli import finetune
from tests.conftest import MiniProject
from tests.support.export_fixtures import converter_cache
from tests.support.history_fixtures import BODIES, make_chain, plan_of, store_of


def back(mini: MiniProject, to: str | None = None) -> Artifact:
    return rollback("mini", mini, store_of(mini), lambda event: None, to=to)


def served(mini: MiniProject) -> str | None:
    return ollama_store.read(mini.ollama_models, "mini")


def system(mini: MiniProject) -> str | None:
    """The system prompt of the model in our store."""
    manifest = json.loads(ollama_store.manifest_path(mini.ollama_models, "mini").read_bytes())
    found = [layer.digest for layer in ollama_store.layers_of(manifest) if layer.kind == "system"]
    return (mini.ollama_models / "blobs" / found[0].replace(":", "-")).read_text() if found else None


@pytest.fixture
def three(mini: MiniProject) -> list[Artifact]:
    """Models of three system prompts; the second of a learning rate of its own, too."""
    made = []
    for values in ({"system": "One & only <1>"}, {"system": "Two", "top_p": 0.5}, {"system": None, "top_p": None}):
        mini.edit(ollama=values, train={"learning_rate": 2e-3 if values["system"] == "Two" else 1e-3})
        made.append(make_chain(mini)["ollama_model"])
    assert len({artifact.metrics["digest"] for artifact in made}) == 3
    return made


def test_the_one_before_with_the_very_bytes(mini: MiniProject, three: list[Artifact]):
    assert served(mini) == three[2].metrics["digest"] and system(mini) is None
    for expected, said in ((three[1], "Two"), (three[0], "One & only <1>")):
        before = served(mini)
        made = back(mini)
        assert made.fingerprint == expected.fingerprint
        assert served(mini) == expected.metrics["digest"] == made.metrics["digest"]
        assert system(mini) == said
        current = store_of(mini).current("mini", "ollama_model")
        metrics = {**expected.metrics, "previous": {"mini:latest": before}}
        assert current is not None and current.manifest == {**expected.manifest, "metrics": metrics}
    with pytest.raises(StepFailed, match=f"mini has no model older than {three[0].fingerprint}\nset --to; published"):
        back(mini)
    assert served(mini) == three[0].metrics["digest"]


def test_the_plan_says_that_the_recipe_asks_for_another(mini: MiniProject, three: list[Artifact]):
    back(mini)
    found = plan_of(mini)["ollama_model"]
    was, now = three[2].metrics["digest"], three[1].metrics["digest"]
    assert found.state == "stale"
    assert found.reasons == (
        f"the Ollama store {mini.ollama_models} serves another mini: {now[:12]} instead of {was[:12]}",
    )
    assert {item.state for name, item in plan_of(mini).items() if name != "ollama_model"} == {"fresh"}
    make_chain(mini)
    assert served(mini) == was
    assert plan_of(mini)["ollama_model"].state == "fresh"


def test_by_the_beginning_of_its_fingerprint(mini: MiniProject, three: list[Artifact]):
    names = [artifact.fingerprint for artifact in three]
    length = next(n for n in range(1, 20) if len({name[:n] for name in names}) == 3)
    assert back(mini, names[0][:length]).fingerprint == names[0]
    assert back(mini, names[2]).fingerprint == names[2]
    assert plan_of(mini)["ollama_model"].state == "fresh"
    for to, words in (("zz", "no artifact begins with 'zz'"), ("", "no artifact begins with ''")):
        with pytest.raises(BadInput, match=words) as caught:
            back(mini, to)
        assert all(name in str(caught.value.hint) for name in names)


def test_two_that_begin_alike(mini: MiniProject, three: list[Artifact]):
    twin = three[0].path.with_name(three[0].fingerprint[:-1] + "x")
    shutil.copytree(three[0].path, twin)
    manifest = (twin / "manifest.json").read_text().replace(three[0].fingerprint, twin.name)
    (twin / "manifest.json").write_text(manifest)
    with pytest.raises(BadInput, match="several artifacts begin"):
        back(mini, three[0].fingerprint[:12])


def test_what_its_weights_came_from_is_gone_or_damaged(mini: MiniProject, three: list[Artifact]):
    store = store_of(mini)
    gguf = store.get("mini", "gguf_file", three[1].inputs["gguf_file"])
    assert gguf is not None
    weights = gguf.path / three[1].metrics["models"]["mini:latest"]["file"]
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(StepFailed, match=f"gguf_file {gguf.fingerprint}: mini-f16.gguf has .* bytes instead of"):
        back(mini)
    store.remove(gguf)
    with pytest.raises(StepFailed, match=f"cannot be served again: .* mini/gguf_file {gguf.fingerprint}: it is gone"):
        back(mini)
    current = store.current("mini", "ollama_model")
    assert current is not None and current.fingerprint == three[2].fingerprint
    assert served(mini) == three[2].metrics["digest"], "what is served stays served"


def test_facts_that_an_earlier_release_did_not_record(mini: MiniProject, three: list[Artifact]):
    old = {key: value for key, value in three[1].metrics.items() if key != "template"}
    store_of(mini).amend(three[1], old)
    with pytest.raises(StepFailed, match="published by an earlier release, which did not record its template"):
        back(mini)


def test_what_is_served_has_to_be_it(mini: MiniProject, three: list[Artifact], monkeypatch: pytest.MonkeyPatch):
    put = serving.serve

    def serve(*arguments, **named):
        return {**put(*arguments, **named), "digests": {"mini:latest": "0" * 64}}

    monkeypatch.setattr("finetune_assets.export.ollama.rollback.serve", serve)
    with pytest.raises(StepFailed, match=r"was published, but .* serves another mini"):
        back(mini)
    current = store_of(mini).current("mini", "ollama_model")
    assert current is not None and current.fingerprint == three[2].fingerprint


def test_the_digest_on_record_follows_the_place(
    mini: MiniProject, three: list[Artifact], monkeypatch: pytest.MonkeyPatch
):
    """A server gives a model another digest than our store does."""
    place = {"digest": "1" * 64, "where": "server", "place": "http://127.0.0.1:1", "commands": ["ollama run mini"]}
    monkeypatch.setattr("finetune_assets.export.ollama.rollback.serve", lambda *_, **__: place)
    monkeypatch.setattr("finetune_assets.export.ollama.rollback.serving_problem", lambda *_: None)
    back(mini)
    kept = store_of(mini).current("mini", "ollama_model")
    assert kept is not None and kept.fingerprint == three[1].fingerprint
    assert kept.metrics == {**three[1].metrics, **place}
    assert {key: value for key, value in kept.manifest.items() if key != "metrics"} == {
        key: value for key, value in three[1].manifest.items() if key != "metrics"
    }


def test_never_made(mini: MiniProject):
    with pytest.raises(StepFailed, match="mini/ollama_model has not been made yet\nfinetune run mini"):
        back(mini)


def test_on_the_command_line(mini: MiniProject, three: list[Artifact]):
    done = finetune(mini, "rollback", "mini")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"mini is {three[1].fingerprint} again" in done.stdout
    assert "ollama_model  stale  the Ollama store" in done.stdout
    assert "finetune run mini serves that one" in done.stdout
    done = finetune(mini, "rollback", "mini", "--to", "nothing")
    assert done.returncode == 2 and "no artifact begins with 'nothing'" in done.stderr and not done.stdout
    done = finetune(mini, "rollback", "mini", "--to", three[2].fingerprint[:10])
    assert "ollama_model  fresh" in done.stdout and "describes a different model" not in done.stdout


@pytest.mark.skipif(find_binary() is None, reason="no Ollama: neither OLLAMA_BIN nor `ollama` on the PATH")
def test_on_a_real_server(
    mini: MiniProject,
    tiny_base: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
):
    made = tmp_path / "f32.gguf"
    converter.convert(tiny_base, made, "f32", converter_cache(request.config), name="mini")

    def gguf_file(step: Step) -> Made:
        shutil.copyfile(made, step.staging / "mini-f32.gguf")
        (step.staging / "chat.json").write_text(json.dumps({"stop": ["<|im_end|>"]}))
        return Made({"types": {"f32": {"file": "mini-f32.gguf"}}}, parts={"f32": ["mini-f32.gguf", "chat.json"]})

    monkeypatch.setitem(BODIES, "gguf_file", gguf_file)
    mini.edit(gguf={"types": ["f32"]}, ollama={"system": "Be <brief>.", "num_ctx": 256, "temperature": 0.5})
    first = make_chain(mini)["ollama_model"]  # into our own store: no server runs yet
    with running(tmp_path / "models") as host:
        monkeypatch.setenv("OLLAMA_HOST", host)
        mini.edit(ollama={"system": "Be long.", "temperature": None})
        second = make_chain(mini)["ollama_model"]
        assert second.metrics["where"] == "server" and show(host, "mini")["system"] == "Be long."
        made_again = back(mini)
        assert made_again.fingerprint == first.fingerprint
        assert digest(host, "mini") == made_again.metrics["digest"] != second.metrics["digest"]
        written = show(host, "mini")
        assert (written["system"], written["template"]) == ("Be <brief>.", first.metrics["template"])
        assert sorted(line.split() for line in written["parameters"].splitlines()) == [
            *(["num_batch", "256"], ["num_ctx", "256"], ["stop", '"<|im_end|>"'], ["temperature", "0.5"])
        ]
        assert "serves another mini" in plan_of(mini)["ollama_model"].reasons[0]
        mini.edit(ollama={"system": "Be <brief>.", "temperature": 0.5})
        assert {item.state for item in plan_of(mini).values()} == {"fresh"}
