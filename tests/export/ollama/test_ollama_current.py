"""Publishing to a current server, as far as the stand-in is one: copies, both ways to a prompt, what it tells."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ollama import ChatResponse, Client, Message, ResponseError

from finetune_assets.export.gguf.form import write_in_form
from finetune_assets.export.ollama import model_store as ollama_store
from finetune_assets.export.ollama import weights as ollama_weights
from finetune_assets.export.ollama.behaviour import behaviour, rendered
from finetune_assets.export.ollama.expected_answer import Expected, expected
from finetune_assets.export.ollama.modelfile import OllamaModel, modelfile
from finetune_assets.export.ollama.rollback import rollback
from finetune_assets.export.ollama.served_checks import answered, compare, written
from finetune_assets.export.ollama.server.api import answers, digest, show
from finetune_assets.export.ollama.server.releases import release
from finetune_assets.export.ollama.server.temporary import find_binary, serving
from finetune_assets.export.ollama.weights import compare_content, copies
from finetune_assets.models.formats.gguf import STRING, read_head
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.store.digests import digest_of_file
from tests.conftest import MiniProject
from tests.export.ollama.test_verify import all_good, failed, look
from tests.support.history_fixtures import make_chain, plan_of, store_of
from tests.support.ollama.fixtures import PARAMETERS, Files, needs_server, put, served, tiny_files, with_weights
from tests.support.ollama.standin import Settings, standing_in
from tests.support.ollama.standin_copies import another_type, backwards, one_weight_changed, other_metadata
from tests.support.ollama.standin_store import copy_weights, llama_quantize

AS_TEMPLATE = "Ollama 0.34.1-standin: prompts by TEMPLATE, weights as sent"
COPY = "Ollama 0.34.1-standin: prompts by TEMPLATE, weights in a copy of its own"


@pytest.fixture(scope="module")
def files(smollm2: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Files:
    return tiny_files(smollm2, tmp_path_factory, request.config)


@pytest.fixture(scope="module")
def model(files: Files) -> OllamaModel:
    return served(files.q8_0, "tiny:latest", system="Be brief.", parameters={**PARAMETERS, "stop": ["<|im_end|>"]})


@pytest.fixture(scope="module")
def reply(model: OllamaModel) -> Expected:
    return expected(model)


@contextmanager
def current(folder: Path, **changes: Any) -> Iterator[str]:
    with standing_in(folder, Settings(**changes)) as host:
        yield host


def client(host: str) -> Client:
    return Client(host=host, timeout=300, trust_env=False)


def test_a_file_of_ours_is_stored_as_it_is(model: OllamaModel, reply: Expected, tmp_path: Path) -> None:
    """By the real llama-quantize where it is; the digest that we sent is the one that is served."""
    with current(tmp_path) as host:
        made = put(host, model, replies={model.name: reply})[model.name]
        assert str(made.behaviour) == AS_TEMPLATE and made.behaviour.digest == model.sha256
        assert made.digest == digest(host, "tiny") == ollama_store.read(tmp_path, "tiny")
        assert ollama_weights.source_of(show(host, "tiny")) == model.sha256
        found = {check.name: check for check in answered(client(host), "tiny", reply, made.behaviour)}
    assert list(found) == ["prompt", "prompt tokens", "first distribution", "first tokens", "stops by itself"]
    assert all(check.ok for check in found.values())
    assert found["prompt"].found == f"{len(reply.prompt)} characters, as in training"
    assert found["first distribution"].found.endswith("over 20 tokens (limit 0.1)")
    assert sum(reply.first.values()) == pytest.approx(1, abs=0.2)


@pytest.mark.skipif(llama_quantize() is None, reason="no llama-quantize here (bench/llama_tools.py)")
def test_our_writer_is_the_tool_s(model: OllamaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the stand-in does without the tool is what it does with it."""
    backwards(model.gguf, tmp_path / "other.gguf")
    copy_weights(tmp_path / "other.gguf", tmp_path / "tool.gguf")
    monkeypatch.setattr("tests.support.ollama.standin_store.llama_quantize", lambda: None)
    copy_weights(tmp_path / "other.gguf", tmp_path / "writer.gguf")
    assert digest_of_file(tmp_path / "tool.gguf") == digest_of_file(tmp_path / "writer.gguf")
    assert digest_of_file(tmp_path / "writer.gguf") != digest_of_file(tmp_path / "other.gguf")


def test_a_copy_of_another_form_is_compared_byte_for_byte(model: OllamaModel, reply: Expected, tmp_path: Path) -> None:
    with current(tmp_path, copy=backwards) as host:
        made = put(host, model, replies={model.name: reply})[model.name]
        assert str(made.behaviour) == COPY and made.behaviour.digest not in (None, model.sha256)
        same, found = compare_content(host, "tiny", show(host, "tiny"), model.gguf, model.sha256, "0.34.1")
        head = read_head(model.gguf)
        assert same and found == (
            f"its digest is {str(made.behaviour.digest)[:12]} instead of {model.sha256[:12]}; "
            f"{len(head.tensors)} tensors and {len(head.raw)} metadata values are the same byte for byte"
        )


@pytest.mark.parametrize(
    ("copy", "words"),
    [
        (one_weight_changed, r"not a copy: tensor blk\.1\.ffn_up\.weight has other weights"),
        (other_metadata, r"not a copy: the metadata value llama\.context_length differs"),
        (another_type, r"not a copy: tensor output\.weight is Q8_0 \(49152, 64\) instead of Q8_0 \(64, 49152\)"),
    ],
)
def test_a_copy_that_differs_is_refused(
    model: OllamaModel, reply: Expected, tmp_path: Path, copy: Callable[[Path, Path], None], words: str
) -> None:
    with current(tmp_path) as host:
        before = put(host, model, replies={model.name: reply})[model.name].digest
    with current(tmp_path, copy=copy) as host, pytest.raises(StepFailed, match=rf"weights: its digest is .*{words}"):
        put(host, replace(model, system="Changed."), replies={model.name: reply})
    with current(tmp_path) as host:
        assert digest(host, "tiny") == before


def unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama_weights, "is_loopback", lambda host: False)


def test_where_bytes_cannot_be_read_what_was_compared_is_said(
    model: OllamaModel, reply: Expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreadable(monkeypatch)
    head = read_head(model.gguf)
    with current(tmp_path / "a", copy=backwards) as host:
        put(host, model, replies={model.name: reply})
        about = host, "tiny", show(host, "tiny"), model.gguf, model.sha256
        same, found = compare_content(*about, "0.34.1")
        assert same and found.endswith(
            f"; {len(head.tensors)} tensors have the same names, shapes and types, and "
            f"{len(head.raw) - 2} metadata values are the same; "
            "its bytes cannot be read here, and were not compared"
        )
        # a release that makes no copies has no business with another file
        same, found = compare_content(*about, "0.31.1")
        assert not same and found.endswith("its bytes cannot be read here, and Ollama 0.31.1 makes no copies")
    for number, (copy, words) in enumerate(
        [(other_metadata, "llama.context_length differs"), (another_type, "tensor output.weight is")]
    ):
        with current(tmp_path / str(number), copy=copy) as host, pytest.raises(StepFailed, match=words):
            put(host, model, replies={model.name: reply})
    # one weight changed goes unseen by the account, and by an answer that it does not change: hence the words above
    with current(tmp_path / "b", copy=one_weight_changed) as host:
        assert (
            "were not compared"
            in compare_content(*(host, "x", _created(host, model), model.gguf, model.sha256, "0.34.1"))[1]
        )


def _created(host: str, model: OllamaModel) -> dict[str, Any]:
    weights = {"x.gguf": client(host).create_blob(model.gguf)}
    client(host).create(model="x", files=weights, template=model.template)
    return show(host, "x")


def test_a_file_under_the_name_of_another(model: OllamaModel, tmp_path: Path) -> None:
    blob = tmp_path / f"sha256-{'0' * 64}"
    shutil.copyfile(model.gguf, blob)
    assert ollama_weights.difference(blob, "0" * 64, model.gguf) == f"{blob} has another content than its name says"
    assert ollama_weights.difference(tmp_path / "gone", "0" * 64, model.gguf) == (
        f"{tmp_path / 'gone'} cannot be read (No such file or directory)"
    )


@pytest.mark.parametrize(
    ("version", "copied", "numbers"),
    [
        ("0.9.3", False, (0, 9, 3)),
        ("0.31.1", False, (0, 31, 1)),
        ("0.31.2-rc1", True, (0, 31, 2)),
        ("v0.32", True, (0, 32, 0)),
        ("1.0.0", True, (1, 0, 0)),
        ("0.0.0", True, None),
        ("of unknown version", True, None),
    ],
)
def test_releases(version: str, copied: bool, numbers: tuple[int, int, int] | None) -> None:
    assert (copies(version), release(version)) == (copied, numbers)


TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}{{ message.tool_calls }}{% endfor %}"


def with_template(files: Files, folder: Path, text: str) -> Path:
    """The model's file with another chat template."""
    target = folder / "templated.gguf"
    head = read_head(files.q8_0)
    write_in_form(files.q8_0, head.with_value("tokenizer.chat_template", STRING, text), target)
    return target


def test_who_renders_prompts_is_found(files: Files, model: OllamaModel, reply: Expected, tmp_path: Path) -> None:
    """The same model on servers that choose differently; a template for tools turns the choice."""
    plain = read_head(files.q8_0).get("tokenizer.chat_template")
    gguf = with_template(files, tmp_path, "{# tools #}" + plain)
    able = replace(model, gguf=gguf, sha256=digest_of_file(gguf))
    known = expected(able)
    assert known.prompt == reply.prompt and known.probes == reply.probes
    by = {}
    for name, one, setting in (
        ("plain", model, None),
        ("able", able, None),
        ("able, TEMPLATE", able, "1"),
        ("0", model, "0"),
    ):
        with current(tmp_path / name, go_template=setting) as host:
            by[name] = str(put(host, one, replies={one.name: known})[one.name].behaviour)
    assert by["plain"] == by["able, TEMPLATE"] == AS_TEMPLATE
    assert by["able"] == by["0"]
    assert by["able"] == AS_TEMPLATE.replace("TEMPLATE", "the chat template in the GGUF file (Jinja)")


def test_a_template_that_is_ignored_is_said(files: Files, model: OllamaModel, reply: Expected, tmp_path: Path) -> None:
    """The file's chat template renders something else than TEMPLATE, and the server prefers it."""
    plain = read_head(files.q8_0).get("tokenizer.chat_template")
    gguf = with_template(files, tmp_path, plain.replace("<|im_start|>assistant\n", "<|im_start|>tool_call\n"))
    changed = replace(model, gguf=gguf, sha256=digest_of_file(gguf))
    with current(tmp_path / "models") as host:
        with pytest.raises(
            StepFailed, match=r"prompt: 'tool_call\\n' instead of 'assistant\\n' at \d+; prompt tokens: "
        ):
            put(host, changed, replies={changed.name: reply})
        assert digest(host, "tiny") is None
        weights = {"x.gguf": client(host).create_blob(gguf)}
        client(host).create(model="x", files=weights, template=model.template, system=model.system)
        found = behaviour(host, "0.34.1", "x", changed, expected(changed))
        assert found.prompts == "the chat template in the GGUF file (Jinja)"
        # a prompt of neither
        client(host).create(model="x", files=weights, template="{{ .System }}{# tools #}", system=model.system)
        assert behaviour(host, "0.34.1", "x", changed, reply).prompts == "neither TEMPLATE nor the chat template"


def test_a_template_that_we_cannot_read(model: OllamaModel, reply: Expected, tmp_path: Path) -> None:
    """What the chat template does not render is TEMPLATE's; what it renders may be either's."""
    with current(tmp_path) as host:
        put(host, model, replies={model.name: reply})
        strange = [replace(model, template=text) for text in ("{{ .Tools }}", "{{- .System }}", "{{ len .Nothing }}")]
        assert {behaviour(host, "0.34.1", "tiny", one, reply).prompts for one in strange} == {"TEMPLATE"}
        alike = replace(reply, probes=())
        assert behaviour(host, "0.34.1", "tiny", strange[0], alike).prompts.endswith(
            "alike; TEMPLATE by the rule of its release"
        )


def test_templates_that_render_alike(model: OllamaModel, reply: Expected, tmp_path: Path) -> None:
    with current(tmp_path) as host:
        put(host, model, replies={model.name: reply})
        found = behaviour(host, "0.34.1", "tiny", model, replace(reply, probes=()))
    assert found.prompts == (
        "TEMPLATE or the chat template (Jinja), which render alike; TEMPLATE by the rule of its release"
    )


def test_a_server_that_tells_nothing(model: OllamaModel, reply: Expected, tmp_path: Path) -> None:
    """It answers with a token instead of a prompt, and without logprobs; the token counts are compared."""
    with current(tmp_path, tells=False) as host:
        made = put(host, model, replies={model.name: reply})[model.name]
        words = "prompts by a template that the server does not tell; TEMPLATE by the rule of its release"
        assert words in str(made.behaviour)
        assert rendered(host, "tiny", reply.messages) is None
        names = [check.name for check in answered(client(host), "tiny", reply, made.behaviour)]
    assert names == ["prompt tokens", "first tokens", "stops by itself"]


def test_counts_without_what_was_read_before(model: OllamaModel, reply: Expected, tmp_path: Path) -> None:
    with current(tmp_path, version="0.30.1", counts_cached=False) as host:
        made = put(host, model, replies={model.name: reply})[model.name]
        answered(client(host), "tiny", reply, made.behaviour)
        again = {check.name: check for check in answered(client(host), "tiny", reply, made.behaviour)}
        assert all(check.ok for check in again.values())
        assert again["prompt tokens"].found == "not compared: Ollama 0.30.1 counts no cached ones"
        # without the text of the prompt, or from a release that counts them, fewer are too few
        for other in (replace(made.behaviour, prompt=None), replace(made.behaviour, version="0.34.1")):
            found = {check.name: check.ok for check in answered(client(host), "tiny", reply, other)}
            assert found["prompt tokens"] is False


def test_another_distribution_is_found(files: Files, model: OllamaModel, reply: Expected, tmp_path: Path) -> None:
    with current(tmp_path) as host:
        put(host, model, replies={model.name: reply})
        other = expected(replace(model, gguf=files.other, sha256=digest_of_file(files.other)))
        found = {check.name: check for check in answered(client(host), "tiny", replace(reply, first=other.first))}
    assert not found["first distribution"].ok and found["first tokens"].ok


def test_thoughts_that_are_told_apart() -> None:
    wanted = Expected("Hi", 5, "<think>\nWell.\n</think>\n\nHello", 9, True)
    message = Message(role="assistant", content="Hello", thinking="Well.")
    answer = ChatResponse(message=message, done_reason="stop", prompt_eval_count=5)
    assert all(check.ok for check in compare(answer, wanted))
    message.thinking = "Ill."
    assert [check.name for check in compare(answer, wanted) if not check.ok] == ["first tokens"]


def test_adapters_are_refused(model: OllamaModel, tmp_path: Path) -> None:
    with current(tmp_path) as host:
        blob = client(host).create_blob(model.gguf)
        with pytest.raises(ResponseError, match="adapters are not supported"):
            client(host).create(model="x", files={"x.gguf": blob}, adapters={"a.gguf": blob})


@needs_server
def test_ollama_s_own_command_line_talks_to_the_stand_in(model: OllamaModel, tmp_path: Path) -> None:
    """Our Modelfile goes through `ollama create`; one with an ADAPTER is refused."""
    binary = find_binary()
    (tmp_path / "Modelfile").write_text(modelfile(model), encoding="utf-8")
    (tmp_path / "Adapted").write_text(f"FROM {model.gguf}\nADAPTER {model.gguf}\n", encoding="utf-8")
    with current(tmp_path / "models") as host:
        environment = {"OLLAMA_HOST": host, "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}

        def ollama(*words: str) -> subprocess.CompletedProcess[str]:
            command = [str(binary), *words]
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

        assert ollama("create", "mine", "-f", str(tmp_path / "Modelfile")).returncode == 0
        assert all(check.ok for check in written(show(host, "mine"), model))
        assert ollama("list").stdout.splitlines()[1].startswith("mine:latest")
        assert "Be brief." in ollama("show", "mine").stdout
        assert ollama("run", "mine", "Hi").returncode == 0
        refused = ollama("create", "adapted", "-f", str(tmp_path / "Adapted"))
        assert refused.returncode == 1 and "adapters are not supported" in refused.stderr


@needs_server
def test_both_layouts_load_on_both_servers(model: OllamaModel, reply: Expected, tmp_path: Path) -> None:
    """Our store as a current server writes it, and one that 0.9.3 wrote: listed, shown, run."""
    ollama_store.write(tmp_path / "ours", [model])
    with serving(tmp_path / "old") as host:
        old = put(host, model, replies={model.name: reply})[model.name]
    layouts = {}
    for store in ("ours", "old"):
        manifest = json.loads(ollama_store.manifest_path(tmp_path / store, "tiny").read_bytes())
        config = json.loads(ollama_store.blob_path(tmp_path / store, manifest["config"]["digest"]).read_bytes())
        layouts[store] = "rootfs" in config
        for server in (serving, standing_in):
            with server(tmp_path / store) as host:
                assert digest(host, "tiny") == ollama_store.read(tmp_path / store, "tiny")
                assert show(host, "tiny")["system"] == "Be brief."
                assert [entry.model for entry in client(host).list().models] == ["tiny:latest"]
                assert all(check.ok for check in answered(client(host), "tiny", reply)), (store, answers(host))
    assert layouts == {"ours": False, "old": True}
    assert ollama_store.read(tmp_path / "old", "tiny") == old.digest


@pytest.fixture(params=["stand-in", "stand-in with copies of another form"])
def anew(
    request: pytest.FixtureRequest,
    mini: MiniProject,
    smollm2: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[str, str]]:
    """A project whose weights an engine can run, and a current server; what its way of serving is called."""
    with_weights(mini, tiny_files(smollm2, tmp_path_factory, request.config), monkeypatch)
    mini.edit(gguf={"types": ["q8_0"]}, ollama={"system": "Be brief.", "num_ctx": 256})
    copy, words = (copy_weights, AS_TEMPLATE) if request.param == "stand-in" else (backwards, COPY)
    with current(tmp_path_factory.mktemp("models"), copy=copy) as host:
        monkeypatch.setenv("OLLAMA_HOST", host)
        yield host, words


def test_publish_verify_and_rollback(mini: MiniProject, anew: tuple[str, str]) -> None:
    """As test_verify does with 0.9.3."""
    host, words = anew
    first = make_chain(mini)["ollama_model"]
    assert first.metrics["served"]["mini:latest"]["by"] == words
    found = look(mini)
    assert all_good(found)
    checks = {check.name: check.found for check in found[f"mini:latest on the server {host}"]}
    assert checks["served by"] == words
    assert ("byte for byte" in checks["weights"]) == (words == COPY)
    assert plan_of(mini)["ollama_model"].state == "fresh"
    mini.edit(ollama={"system": "Be long."})
    second = make_chain(mini)["ollama_model"]
    assert second.metrics["previous"] == {"mini:latest": first.metrics["digest"]}
    assert digest(host, "mini") == second.metrics["digest"] != first.metrics["digest"]
    rollback("mini", mini, store_of(mini), lambda event: None)
    assert digest(host, "mini") == first.metrics["digest"] and all_good(look(mini))


def test_another_copy_than_the_one_on_record(mini: MiniProject, anew: tuple[str, str]) -> None:
    """Someone created the model again on a server whose copies differ by now."""
    _, words = anew
    made = make_chain(mini)["ollama_model"]
    facts = {**made.metrics, "served": {"mini:latest": {"by": words, "weights": "f" * 64}}}
    store_of(mini).amend(made, facts)
    found = failed(look(mini))
    if words == COPY:
        assert found["weights"].startswith("the server stored them as ffffffffffff, and has ")
    else:
        assert not found, "the file itself is always good"
    # an earlier release kept no such record
    facts.pop("served")
    store_of(mini).amend(made, facts)
    assert all_good(look(mini))
