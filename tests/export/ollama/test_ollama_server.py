"""Publishing to an Ollama server: a real one where there is one, stand-ins for what a real one does not do."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ollama import Client

from finetune_assets.chat.rendering import render_jinja
from finetune_assets.export.gguf.chat_metadata import special_tokens
from finetune_assets.export.ollama import expected_answer as asking
from finetune_assets.export.ollama import model_store as ollama_store
from finetune_assets.export.ollama.expected_answer import Expected, expected
from finetune_assets.export.ollama.modelfile import modelfile
from finetune_assets.export.ollama.served_checks import Check, answered, in_store, written
from finetune_assets.export.ollama.server import api as ollama_server
from finetune_assets.export.ollama.server.api import digest, show
from finetune_assets.export.ollama.server.temporary import find_binary, serving
from finetune_assets.export.ollama.template.derive import battery, derive
from finetune_assets.models.formats.gguf import read_head
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.store.digests import digest_of_file
from tests.export.ollama.test_go_template import BRACES, END_MARKED, LATE, LEFT_OUT
from tests.support.events import json_into
from tests.support.ollama.fixtures import PARAMETERS, Files, needs_server, put, served, tiny_files
from tests.support.servers.tcp_proxy import Fault, Proxy

SYSTEM = 'You are "Ada" <& co>.\nBe {{ .brief }}. 你好 """'
LICENSES = ("Apache-2.0 <x>",)


@pytest.fixture(scope="module")
def files(smollm2: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Files:
    return tiny_files(smollm2, tmp_path_factory, request.config)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ollama-models")


@pytest.fixture(scope="module")
def host(models: Path) -> Iterator[str]:
    with serving(models) as address:
        yield address


def tokens(base: Path, gguf: Path, messages: list[dict[str, str]]) -> int:
    """How many tokens the conversation's prompt has in training."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(base))
    head = read_head(gguf)
    text = render_jinja(head.get("tokenizer.chat_template"), messages, special_tokens(head))
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def told(events: list[dict[str, Any]]) -> list[str]:
    return [event["text"] for event in events if event["event"] == "message"]


def failed(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.found for check in checks if not check.ok}


def client(host: str) -> Any:
    from ollama import Client

    return Client(host=host, timeout=300, trust_env=False)


def test_what_llama_cpp_answers(files: Files, smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "QUESTIONS", ("Who are you?",))
    reply = expected(served(files.f32, system=SYSTEM))
    conversation = [{"role": "system", "content": SYSTEM}, *reply.messages]
    assert reply.prompt_tokens == tokens(smollm2, files.f32, conversation)
    assert 2 < reply.tokens <= asking.ENOUGH and not reply.ends and len(reply.text) > 10
    # a stop text ends the answer, and is no part of it
    half = len(reply.text) // 2
    stop = reply.text[half : half + 4]
    cut = expected(served(files.f32, system=SYSTEM, parameters={**PARAMETERS, "stop": [stop]}))
    assert cut.ends and cut.text == reply.text[: reply.text.index(stop)].lstrip() and 0 < cut.tokens <= reply.tokens
    # nothing is clear to those who ask for too much
    monkeypatch.setattr(asking, "CLEAR", 1e9)
    assert expected(served(files.f32)) == Expected(
        "Who are you?", expected(served(files.f32)).prompt_tokens, "", 0, False
    )


def test_a_question_that_ends_is_preferred(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, second) = ("Who are you?", "What is the capital of France?")
    monkeypatch.setattr(asking, "QUESTIONS", (second,))
    said = expected(served(files.f32)).text
    monkeypatch.setattr(asking, "QUESTIONS", (first, second))
    assert not expected(served(files.f32)).ends
    stop = {**PARAMETERS, "stop": [said[-4:]]}
    found = expected(served(files.f32, parameters=stop))
    assert (found.question, found.ends) == (second, True)


def test_a_system_prompt_that_fills_the_context(files: Files) -> None:
    model = served(files.q8_0, system="word " * 200, parameters={"num_ctx": 128})
    with pytest.raises(StepFailed, match=r"take \d+ tokens of a context of 128\nraise ollama.num_ctx"):
        expected(model)


@needs_server
def test_real_server_and_own_store_agree(files: Files, smollm2: Path, host: str, models: Path, tmp_path: Path) -> None:
    options = {"stop": ["<|im_end|>", 'say "no"\u3000'], **PARAMETERS, "temperature": 0.0, "top_p": 0.95}
    model = served(files.q8_0, system=SYSTEM, parameters=options, licenses=LICENSES)
    reply = expected(model)
    assert reply.prompt_tokens == tokens(smollm2, files.q8_0, [{"role": "system", "content": SYSTEM}, *reply.messages])
    events: list[dict[str, Any]] = []
    made = put(host, model, replies={model.name: reply}, progress=json_into(events))[model.name]
    stages = ["creating tiny:latest", "checking what tiny:latest serves"]
    assert told(events) == [f"sending tiny-q8_0.gguf, {files.q8_0.stat().st_size / 1e6:.1f} MB", *stages]
    steps = [event for event in events if event["event"] == "step"]
    assert steps[-1]["step"] == steps[-1]["steps"] == round(files.q8_0.stat().st_size / 1e6)
    assert made.digest == digest(host, "tiny") == ollama_store.read(models, "tiny")
    assert str(made.behaviour) == "Ollama 0.9.3: prompts by TEMPLATE, weights as sent"
    assert made.behaviour.digest == model.sha256
    assert made.previous is None
    assert set(ollama_server.digests(host)) == {"tiny:latest"}, "no staging tag is left"
    # Our own store: the same blobs but for what a current server leaves out of the configuration. (A server adds to its
    # manifest where on its disk the weights came from.)
    ours = ollama_store.write(tmp_path / "store", [model])[model.name]
    theirs = json.loads(ollama_store.manifest_path(models, "tiny").read_bytes())
    manifest = json.loads(ollama_store.manifest_path(tmp_path / "store", "tiny").read_bytes())
    assert ours.layers == ollama_store.layers_of(theirs)
    configured, plain = (
        json.loads(ollama_store.blob_path(store, config["digest"]).read_bytes())
        for store, config in ((models, theirs.pop("config")), (tmp_path / "store", manifest.pop("config")))
    )
    assert configured.pop("rootfs")["diff_ids"] == [layer.digest for layer in ours.layers]
    assert configured == plain and list(configured) == list(plain)
    theirs["layers"][0].pop("from", None)
    assert manifest == theirs
    assert not failed(in_store(tmp_path / "store", model, ours.digest))
    # Again: the weights are there already.
    events.clear()
    again = put(host, model, replies={model.name: reply}, progress=json_into(events))[model.name]
    assert (again.digest, again.previous) == (made.digest, made.digest)
    assert told(events) == stages and len(events) == 2
    # A second server over our store takes it for its own, reads the same prompt, and says the same.
    with serving(tmp_path / "store") as other:
        assert digest(other, "tiny") == ours.digest
        for address in (host, other):
            assert not failed(written(show(address, "tiny"), model))
            assert not failed(answered(client(address), "tiny", reply))
    assert ollama_store.read(tmp_path / "store", "tiny") == ours.digest  # nothing was pruned


@needs_server
def test_several_types_under_names_of_their_own(files: Files, host: str) -> None:
    first = put(host, served(files.f32, "many:latest"), served(files.q8_0, "many:q8_0"))
    assert ollama_server.digests(host).items() >= {name: made.digest for name, made in first.items()}.items()
    assert digest(host, "many") != digest(host, "many:q8_0")
    # one that is wanted no longer goes, if it is still ours; what the owner put there stays
    retired = {"many:q8_0": first["many:q8_0"].digest, "many:own": "0" * 64}
    client(host).copy("many:q8_0", "many:own")
    client(host).copy("many:q8_0", "many:staging-left")
    second = put(host, served(files.f32, "many:latest", system="Be brief."), retired=retired)
    assert second["many:latest"].previous == first["many:latest"].digest
    assert {name for name in ollama_server.digests(host) if name.startswith("many:")} == {"many:latest", "many:own"}


@needs_server
@pytest.mark.parametrize("template", [LATE, LEFT_OUT, END_MARKED, BRACES])
def test_a_server_renders_what_the_chat_template_does(files: Files, host: str, template: str) -> None:
    """As far as the number of tokens shows, which is all that a server of this release tells."""
    specials = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    text = derive(template, specials, add_bos=False).text
    weights = {"x.gguf": client(host).create_blob(files.q8_0)}
    client(host).create(model="derived", files=weights, template=text, parameters=dict(PARAMETERS))
    for messages in [messages for kind, messages in battery() if kind == "ordinary"][::7]:
        read = [message for message in messages if template != LEFT_OUT or message["role"] != "system"]
        prompt, options = render_jinja(template, read, specials), {"num_predict": 1}
        raw = client(host).generate(model="derived", prompt=prompt, raw=True, options=options)
        answer = client(host).chat(model="derived", messages=messages, options=options)
        assert answer.prompt_eval_count == raw.prompt_eval_count, messages
    client(host).delete("derived")


@needs_server
def test_names_move_one_by_one_and_are_what_the_server_calls_them(
    files: Files, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models from elsewhere have tags like Q5_0. Where there is one, a server makes our q5_0 a Q5_0, too."""
    client(host).create(model="elsewhere:Q5_0", files={"x.gguf": client(host).create_blob(files.q8_0)})
    plain, other = [served(files.q8_0, f"Capital:{tag}") for tag in ("latest", "q5_0")]
    reply, copy = expected(plain), Client.copy
    with Proxy(host) as proxy:

        def then_fail(self: Client, *names: str) -> Any:
            answer = copy(self, *names)
            proxy.faults = [Fault("POST /api/copy", answer=("500 Internal Server Error", '{"error": "no luck"}'))]
            return answer

        monkeypatch.setattr(Client, "copy", then_fail)
        with pytest.raises(StepFailed, match="refused Capital: no luck") as caught:
            put(proxy.host, plain, other, replies={model.name: reply for model in (plain, other)})
    assert str(caught.value.hint).startswith("it serves the new Capital:latest, and no other of the new models; fix")
    assert {name for name in ollama_server.digests(host) if "capital" in name} == {"capital:latest"}, "none is staged"
    before = digest(host, "capital")
    made = put(host, other, replies={other.name: reply}, retired={"library/CAPITAL:latest": before or ""})[other.name]
    assert made.previous is None and made.digest == digest(host, "capital:q5_0") == before
    assert {model.model for model in client(host).list().models if "apital" in str(model.model)} == {"Capital:Q5_0"}


@needs_server
def test_real_server_failure_leaves_the_old_models_in_place(files: Files, host: str, tmp_path: Path) -> None:
    good, second = served(files.f32, "kept:latest", system="one"), served(files.q8_0, "kept:q8_0", system="one")
    before = put(host, good, second)
    replies = {model.name: expected(replace(model, system="two")) for model in (good, second)}
    changed = [replace(model, system="two") for model in (good, second)]
    wrong = replace(replies[second.name], prompt_tokens=3)
    with pytest.raises(StepFailed, match=r"reads \d+ tokens where training would read 3"):
        put(host, *changed, replies={**replies, second.name: wrong})
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model")
    with pytest.raises(StepFailed, match="refused kept"):
        put(host, changed[0], replace(second, gguf=broken, sha256=digest_of_file(broken)), replies=replies)
    with pytest.raises(StepFailed, match=r"refused broken.gguf: HTTP 400: digest mismatch"):
        put(host, replace(good, gguf=broken, sha256="0" * 64), replies=replies)
    assert {name: digest(host, name) for name in before} == {name: made.digest for name, made in before.items()}
    assert {show(host, name)["system"] for name in before} == {"one"}
    assert {name for name in ollama_server.digests(host) if name.startswith("kept:")} == set(before)


@needs_server
def test_an_answer_that_differs_has_a_check(files: Files, host: str) -> None:
    """What is written of a model that differs is in test_battery."""
    parameters = {**PARAMETERS, "stop": ["<|im_end|>"]}
    model = served(files.f32, "checked:latest", system="one", parameters=parameters)
    reply = expected(model)
    put(host, model, replies={model.name: reply})
    asked = answered(client(host), model.name, reply)
    assert [check.name for check in asked] == ["prompt tokens", "first tokens", "stops by itself"]
    assert not failed(asked)
    assert list(failed(answered(client(host), model.name, replace(reply, prompt_tokens=1)))) == ["prompt tokens"]
    other = replace(expected(served(files.other, system="one", parameters=parameters)), question=reply.question)
    assert list(failed(answered(client(host), model.name, other))) == ["first tokens"]
    # of two models with these words, one says more
    cut = replace(reply, ends=True)
    found = failed(answered(client(host), model.name, cut))
    assert list(found) == ["first tokens", "stops by itself"] and found["stops by itself"] == "it does not (length)"


@needs_server
def test_a_stop_text_ends_the_answer_where_llama_cpp_ends_it(files: Files, host: str) -> None:
    said = expected(served(files.f32)).text
    parameters = {**PARAMETERS, "stop": [said[-4:]]}
    model = served(files.f32, "stops:latest", parameters=parameters)
    reply = expected(model)
    assert reply.ends
    put(host, model, replies={model.name: reply})
    assert [check.found for check in answered(client(host), model.name, reply)][2] == "it does"


TEXTS = [
    'ends in """',
    '"""begins',
    'a line that ends in """\nand goes on',
    '"""\n"""\n""" ',
    '""" """',
    "{{ .System }} {{ end }} {{{ }} {% x %}",
    "'single' \"double\" `back` \\n \\",
    "\nnew lines\r\n\tand tabs\n\n",
    "你好，世界。\u3000全角\u00a0　👨‍👩‍👧\u200b\ufeff",
    "$HOME %s <|im_end|> <b>&amp;</b> \x7f\x01",
]


@needs_server
def test_any_text_arrives_as_it_is(files: Files, host: str, tmp_path: Path) -> None:
    """On the server, in our store, and in the Modelfile, if it can hold it."""
    binary = find_binary()
    assert binary is not None
    held, template = [], served(files.q8_0).template
    for number, text in enumerate(TEXTS):
        name = f"text{number}:latest"
        parameters = {**PARAMETERS, "stop": ["<|im_end|>", text]}
        model = served(
            files.q8_0, name, system=text, template="{{ .System }}{{ .Prompt }}" + text, parameters=parameters
        )
        (ours,) = ollama_store.write(tmp_path / "store", [model]).values()
        assert not failed(in_store(tmp_path / "store", model, ours.digest)), text
        layers = {layer.kind: ollama_store.blob_path(tmp_path / "store", layer.digest) for layer in ours.layers}
        assert layers["system"].read_bytes() == text.encode()
        assert json.loads(layers["params"].read_bytes())["stop"] == ["<|im_end|>", text]
        plain = replace(model, template=template)
        client(host).create(
            model=name,
            files={"x.gguf": f"sha256:{model.sha256}"},
            template=plain.template,
            system=text,
            parameters=parameters,
        )
        assert not failed(written(show(host, name), plain)), text
        file = tmp_path / "Modelfile"
        file.write_bytes(modelfile(plain).encode())
        command = [str(binary), "create", f"file{number}", "-f", str(file)]
        environment = {"OLLAMA_HOST": host, "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
        checks = failed(written(show(host, f"file{number}"), plain))
        if "# SYSTEM is left out" in modelfile(plain):
            assert set(checks) == {"system", "stops"}, "said, and left out"
        else:
            held.append(number)
            assert not checks, text
    assert held == [0, 1, 4, 5, 6, 7]
