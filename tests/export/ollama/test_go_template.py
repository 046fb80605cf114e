"""Ollama templates derived from Jinja ones: the same prompts, or a reason."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from finetune_assets.chat.rendering import render_jinja
from finetune_assets.export.ollama.modelfile import OllamaModel, modelfile, parameters
from finetune_assets.export.ollama.template import go_eval
from finetune_assets.export.ollama.template.derive import battery, derive, go_data
from finetune_assets.recipe import OllamaSection
from finetune_assets.reporting.errors import StepFailed
from tests.support.export_fixtures import CHATML

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    + CHATML.removeprefix("{% for message in messages %}")
)
LLAMA3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    "+ m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}{% if loop.first and system is defined %}"
    "{{ ' [INST] ' + system + '\n\n' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' [INST] ' + m['content'] + ' [/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
LEFT_OUT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<|user|>\n' + m['content'] + '<|end|>\n<|assistant|>\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
)
LATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
COMMANDED = (
    "{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{{ '<system>' + said.replace('/quiet', '').strip() + '\n' }}{% endif %}"
    "{% for m in messages %}{{ m['role'] + (' softly' if said and '/quiet' in said else '') + ': ' + m['content'] }}"
    "<end>{% endfor %}{% if add_generation_prompt %}assistant{{ ' softly' if said and '/quiet' in said }}: {% endif %}"
)
NO_THOUGHTS = CHATML.replace("message['content']", "message['content'].split('</think>')[-1].lstrip('\n')")
NOTHING_EMPTY = CHATML.replace("%}", "%}{{ raise_exception('empty') if not message['content'] }}", 1)
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
BRACES = CHATML.replace("<|im_start|>", "<{{ ")
END_MARKED = CHATML.replace("{% if add_generation_prompt %}", "{% if not add_generation_prompt %}<end>{% else %}")


@pytest.mark.parametrize(
    ("template", "system", "notes"),
    [
        (CHATML, True, 0), (SMOLLM, True, 0), (LLAMA3, True, 1), (MISTRAL, True, 0), (NO_SYSTEM, False, 1),
        (BRACES, True, 0), (END_MARKED, True, 0), (LEFT_OUT, False, 1), (LATE, True, 1), (COMMANDED, True, 0),
        (NO_THOUGHTS, True, 1), (TOOLS, True, 1), (NOTHING_EMPTY, True, 3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("add_bos", [False, True])
def test_same_prompts(template: str, system: bool, notes: int, add_bos: bool) -> None:
    """Over more conversations than the derivation itself looks at."""
    if add_bos and "bos_token" not in template:
        with pytest.raises(StepFailed, match="before every prompt"):
            derive(template, TOKENS, add_bos=True)
        return
    go = derive(template, TOKENS, add_bos=add_bos)
    assert any("no system message" in note for note in go.notes) is not system
    assert len(go.notes) == notes
    assert not (add_bos and "<s>" in go.text)
    talks = [messages for kind, messages in battery() if kind == "ordinary"]
    talks.append(
        [{"role": role, "content": f"{role} {n} 好 }}}} {{{{"} for n in range(9) for role in ("user", "assistant")][:-1]
    )
    for messages in talks:
        got = ("<s>" if add_bos else "") + go_eval.render(go.text, go_data(messages))
        read = messages if system else [message for message in messages if message["role"] != "system"]
        assert got == render_jinja(template, read, TOKENS)


def test_templates_that_models_ship() -> None:
    """TRL brings the chat templates of many families. Those of models that also see want pictures, not text."""
    for_pictures = {"idefics3", "llava_next", "smolvlm"}
    files = sorted(Path(str(resources.files("trl"))).glob("chat_templates/*.jinja"))
    assert len(files) > 60
    for file in files:
        template = file.read_text(encoding="utf-8")
        name = file.stem.removesuffix("_training")
        try:
            go = derive(template, TOKENS, add_bos=False, system="Be brief.")
        except StepFailed:
            assert name in for_pictures, name
            continue
        assert name not in for_pictures and go.text
        assert any("tools" in note for note in go.notes) is ("{%- if tools" in template or "if tools" in template), name


@pytest.mark.parametrize(
    ("template", "asked", "served"),
    [
        (CHATML, " two\nlines\n", " two\nlines\n"),
        (LLAMA3, " two\nlines\n", "two\nlines"),
        (LATE, "one\n", "one\n"),
        (LEFT_OUT, "one", None),
        (NO_SYSTEM, "one", None),
        (CHATML, None, None),
        (LLAMA3, " \n", None),
        (COMMANDED, "one\n", "one"),
    ],
)
def test_the_system_prompt_that_is_served(template: str, asked: str | None, served: str | None) -> None:
    """A YAML block ends in a line break, which some chat templates take away; SYSTEM must be what they make of it."""
    assert derive(template, TOKENS, add_bos=False, system=asked).system == served


def test_a_system_prompt_that_changes_the_template() -> None:
    with pytest.raises(
        StepFailed, match=r"with this system prompt: it writes .* softly: .*\ntake out of ollama.system"
    ):
        derive(COMMANDED, TOKENS, add_bos=False, system="Be brief. /quiet")


def test_smollm2_template_as_text() -> None:
    """The default system prompt stands only where a conversation brings none."""
    text = derive(SMOLLM, TOKENS, add_bos=False).text
    hello = {"role": "user", "content": "hi"}
    bare = go_eval.render(text, go_data([hello]))
    told = go_eval.render(text, go_data([{"role": "system", "content": "Be brief."}, hello]))
    assert bare.startswith(
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    )
    assert told == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    begun = go_eval.render(text, go_data([hello, {"role": "assistant", "content": "I am"}]))
    assert begun.endswith("<|im_start|>assistant\nI am")  # an answer begun by the caller is not closed


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[-1]['content'] }}", "moves, repeats or leaves out"),
        ("{% for m in messages | reverse %}{{ m['role'] + m['content'] }}{% endfor %}", "moves, repeats or leaves out"),
        ("{{ raise_exception('never') }}", "refuses an ordinary conversation: never"),
        ("{% for m in messages %}{{ loop.index ~ m['content'] }}{% endfor %}", "more than one way"),
        (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | upper }}\n{% endfor %}",
            "moves, repeats or leaves",
        ),
        ("{% for m in messages %}{{ m['content'] + none }}{% endfor %}", "refuses an ordinary conversation: can only"),
        (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | replace('🙂', ':)') }}\n{% endfor %}",
            "where .* would be",
        ),
    ],
)
def test_reasons(template: str, reason: str) -> None:
    with pytest.raises(StepFailed, match=reason):
        derive(template, TOKENS, add_bos=False)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ('{{ if eq .A "x" }}1{{ else if and (ne .A "y") .B }}2{{ else }}3{{ end }}', "2"),
        ("{{ range $i, $x := .L }}{{ $n := len (slice $.L $i) }}{{ $i }}{{ $x }}{{ $n }};{{ end }}", "0a2;1b1;"),
        ('{{ (index .M 0).K }}{{ "{{\\n" }}', "v{{\n"),
        ("{{ range $i, $x := .L }}{{ if le $i 0 }}{{ $.A }}{{ end }}{{ $x }}{{ end }}", "zab"),
        ("{{ range $i, $x := .L }}{{ . }}{{ end }}{{ if not .B }}no{{ end }}{{ or .E .A }}", "abz"),
    ],
)
def test_evaluator(template: str, text: str) -> None:
    assert go_eval.render(template, {"A": "z", "B": 1, "L": ["a", "b"], "M": [{"K": "v"}], "E": ""}) == text


@pytest.mark.parametrize("template", ["{{ end }}", "{{ if .A }}x", "{{ .A | len }}", "{{ $x }}", "{{ .A", "{{- .A }}"])
def test_evaluator_refuses_what_it_does_not_know(template: str) -> None:
    with pytest.raises(ValueError):
        go_eval.render(template, {"A": "z"})


def test_modelfile_and_parameters(tmp_path: Path) -> None:
    section = OllamaSection.model_validate({"name": "x", "stop": "###,<|im_end|>", "top_k": 5, "temperature": 0})
    options = parameters(section, ["<|im_end|>"])
    assert options == {"stop": ["<|im_end|>", "###"], "num_ctx": 2048, "temperature": 0.0, "top_k": 5}
    assert parameters(OllamaSection.model_validate({"name": "x", "num_ctx": 64}), []) == {
        "num_batch": 64,
        "num_ctx": 64,
    }
    model = OllamaModel("x:latest", Path("x.gguf"), "0" * 64, "{{ .Content }}\n", 'a "b"', options)
    text = modelfile(model)
    assert text.splitlines()[0] == "FROM x.gguf"
    assert 'SYSTEM """a "b""""\n' in text
    assert 'PARAMETER stop """###"""\n' in text
    for system, what in (('a """ \nb', 'a line that ends in """'), ("full\u3000width", "the character U+3000")):
        text = modelfile(replace(model, system=system))
        comment = f"# SYSTEM is left out: a Modelfile cannot hold {what}; the served model has it"
        assert comment in text.splitlines() and "\nSYSTEM" not in text
