"""Both ways in which servers make prompts, against training's: dates, thinking, tools, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.chat.pinning import pinned, pins
from finetune_assets.chat.rendering import render_jinja
from finetune_assets.export.ollama.template.proof import CALLS, ORDINARY, TOOLS, Proof, prove_file
from finetune_assets.reporting.errors import StepFailed
from tests.support.export_fixtures import CHATML
from tests.support.ollama.template_files import SPECIALS, letters_file

HELLO = [{"role": "user", "content": "hi"}]
TODAY = "{{ strftime_now('%d %B %Y') }}, {{ strftime_now(\"%y\") }}|" + CHATML
DATED = "{{ date_string | default('26 Jul 2024') }}|" + CHATML
THINKS = CHATML.replace("assistant\n'", "assistant\n' + ('<think>\n' if enable_thinking else '')") + "{# </think> #}"
MAYBE = CHATML + "{% if enable_thinking is defined %}{{ '[on]' if enable_thinking else '[off]' }}{% endif %}"
THINKS_ANYWAY = CHATML + "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}</think>"
TOOLFUL = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}"
    "</end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def proof(folder: Path, template: str, architecture: str = "llama") -> Proof:
    return prove_file(letters_file(folder / "letters.gguf", template, architecture))


@pytest.mark.parametrize(
    ("template", "start", "note"),
    [
        (TODAY, "26 July 2024, 24|", "the date in the prompt is 26 July 2024"),
        (DATED, "26 Jul 2024|", "the date in the prompt is 26 July 2024"),
        (THINKS, "", "thinking is off"),
        (MAYBE, "", "thinking is off"),
    ],
)
def test_what_engines_answer_differently_is_pinned(tmp_path: Path, template: str, start: str, note: str) -> None:
    """Unpinned, llama.cpp makes other prompts; pinned, the same ones, which are those of training."""
    assert ORDINARY in proof(tmp_path, template).jinja or template == TODAY
    fixed = pinned(template)
    assert pinned(fixed) == fixed != template
    assert [text for text in pins(fixed) if text.startswith(note)] and not pins(template)
    told: dict[str, Any]
    for told in ({"enable_thinking": True}, {"enable_thinking": False}, {"date_string": "1 Jan 1970"}):
        rendered = render_jinja(fixed, HELLO, SPECIALS | told)
        assert rendered.startswith(start) and rendered == render_jinja(fixed, HELLO, SPECIALS)
    if template != TODAY:  # training without pins has the same prompts
        assert rendered == render_jinja(template, HELLO, SPECIALS)
    found = proof(tmp_path, fixed)
    assert not found.jinja and not found.problem and any(text.startswith(note) for text in found.notes)


@pytest.mark.parametrize(
    "template",
    [CHATML, THINKS_ANYWAY, TOOLFUL, "{# strftime_now, enable_thinking, date_string #}" + CHATML,
     "{% set clock = strftime_now %}" + CHATML, "{{ raise_exception('strftime_now enable_thinking') }}", "{{"],
)  # fmt: skip
def test_nothing_is_pinned_that_does_not_matter(template: str) -> None:
    """Nor is anything that cannot be."""
    assert pinned(template) == template


def test_the_demo_keeps_its_chat_template(smollm2: Path) -> None:
    from finetune_assets.chat.tokenizer import load_tokenizer

    own = str(load_tokenizer(smollm2, trust_remote_code=False).chat_template)
    assert pinned(own) == own


def test_a_current_server_that_would_render_otherwise(tmp_path: Path) -> None:
    found = proof(tmp_path, THINKS)
    assert found.current.path == "jinja"
    assert found.problem is not None and re.search(r"otherwise than training does: it writes .*<think>", found.problem)
    assert found.problem in found.notes
    # a server that follows TEMPLATE does not care
    found = proof(tmp_path, MAYBE)
    assert found.current.path == "template" and ORDINARY in found.jinja and not found.problem and not found.notes


def test_tools(tmp_path: Path) -> None:
    found = proof(tmp_path, TOOLFUL)
    assert (found.current.path, found.jinja) == ("jinja", {})
    assert "later releases with the chat template in the GGUF file (the chat template can do more" in found.way
    assert ["refuses requests with tools" in note for note in found.notes] == [True]
    found = proof(tmp_path, TOOLFUL + "{% if tools and enable_thinking is defined %}!{% endif %}")
    assert not found.problem and set(found.jinja) == {TOOLS, CALLS}
    assert [note for note in found.notes if note.startswith(f"{TOOLS}: rendered differently by Ollama since 0.30")]


def test_code_of_the_server_itself(tmp_path: Path) -> None:
    from contextlib import closing

    from finetune_assets.export.ollama.template.proof import prove
    from finetune_assets.models.engines.llama_cpp_probe import ProbeEngine

    file = letters_file(tmp_path / "letters.gguf", CHATML)
    with closing(ProbeEngine(file, num_ctx=64, letter=0, pure=False)) as engine:
        found = prove(engine, CHATML, SPECIALS, add_bos=False, architecture="nemotron_h")
    assert found.current.path == "server"
    assert "the servers' own code was not" in found.way and "the server renders nemotron_h models itself" in found.way


def test_refused_without_a_template(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="moves, repeats or leaves out messages"):
        proof(tmp_path, "{{ messages[-1].content }}")
