"""Chat templates of strangers: loops without end and texts that fill the memory are refused in time."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.assets.lora_adapter import LORA_ADAPTER
from finetune_assets.chat import template_limits
from finetune_assets.chat.named_templates import CHATML, LLAMA3, SMOLLM2
from finetune_assets.chat.template import encode_prompt
from finetune_assets.chat.template_limits import prove, prove_folder
from finetune_assets.lineage.materialise import Progress, Step, materialise
from finetune_assets.recipe.file import load_recipe
from finetune_assets.reporting.errors import BadInput
from finetune_assets.store.artifact import Made
from finetune_assets.worker.tasks.task import Task
from tests.conftest import MiniProject
from tests.support.history_fixtures import BODIES, stand_in
from tests.support.training_fixtures import tiny_tokenizer

LOOP = "{% for a in range(99999) %}"
ENDLESS = LOOP * 3 + "{% endfor %}" * 3  # 10^15 turns
LARGE = {
    "a text": "{{ 'x' * 4 * 10**10 }}",
    "a list": "{% set a = [0] * 4 * 10**10 %}",
    "a text of the conversation": "{{ messages[0].content * 10**10 }}",
    "doubling": "{% set ns = namespace(x='xxxx') %}" + LOOP + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "padding": "{{ '%999999999999d' % 1 }}",
    "output": "{% for a in range(99999) %}{% for b in range(99999) %}" + "x" * 1000 + "{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("template", [CHATML, SMOLLM2, LLAMA3, "{% generation %}{{ x }}{% endgeneration %}",
                                      "{{ 1/0 }}", "{% if", "{{ raise_exception('no') }}", ""])  # fmt: skip
def test_what_stays_within_limits_passes(template: str):
    """Also what is wrong otherwise: whoever renders it says so."""
    prove(template)


def test_an_endless_loop_is_ended():
    began = time.monotonic()
    with pytest.raises(BadInput, match="it renders a short conversation for more than 2 s"):
        prove(ENDLESS, seconds=2)
    assert time.monotonic() - began < 6


@pytest.mark.parametrize("kind", LARGE)
def test_memory_is_bounded(kind: str):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    with pytest.raises(BadInput, match=r"cannot be used: it (takes more than 2.0 GB of memory|renders)"):
        prove(LARGE[kind], seconds=5)
    after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert max(after - before, 0) * 1024 < 2 * template_limits.MEMORY


def test_what_passed_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prove(CHATML, cache=tmp_path)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    prove(CHATML, cache=tmp_path)
    with pytest.raises(FileNotFoundError):
        prove(CHATML + " ", cache=tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", "TEMPLATE"),
        ("tokenizer_config.json", {"chat_template": "TEMPLATE"}),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": "TEMPLATE"}]}),
        ("chat_template.json", {"chat_template": "TEMPLATE"}),
        ("chat.json", {"template": "TEMPLATE"}),
    ],
)
def test_every_place_of_a_template_is_looked_at(tmp_path: Path, file: str, content: object):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / file).write_text(text.replace("TEMPLATE", LARGE["a text"]))
    with pytest.raises(BadInput, match=rf"the chat template of {file} cannot be used: it takes more"):
        prove_folder(tmp_path, None)


def test_conversations_of_the_rows_are_tried(tmp_path: Path):
    trap = "{% if messages[0].content == 'now' %}{{ 'x' * 4 * 10**10 }}{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(trap)
    prove_folder(tmp_path, None)
    with pytest.raises(BadInput, match="takes more than"):
        prove_folder(tmp_path, None, [[{"role": "user", "content": "now"}]])


def test_a_pipe_for_a_template_does_not_block(tmp_path: Path):
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(BadInput, match="is a named pipe, not a file"):
        prove_folder(tmp_path, None)


def test_a_conversation_that_was_not_tried_ends_too():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages|length > 2 %}" + ENDLESS + "{% endif %}x"
    began = time.monotonic()
    turns = [{"role": "user", "content": "a"}] * 3
    with pytest.raises(BadInput, match="renders a conversation for more than 10 s"):
        encode_prompt(tokenizer, turns)
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("template", ["{{ 1/0 }}", "{{ messages[9].content.x.y }}", "{{ '%d' % 'a' }}", "{% if"])
def test_a_template_that_fails_is_an_explained_failure(template: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(BadInput, match="the chat template refuses a conversation with the roles user"):
        encode_prompt(tokenizer, [{"role": "user", "content": "a"}])


def test_the_program_loads_little():
    program = Path(template_limits.__file__).with_name("template_child.py")
    job = {"template": CHATML, "conversations": [], "specials": {}, "seconds": 10, "bytes": 300_000_000}
    done = subprocess.run([sys.executable, "-I", str(program)], input=json.dumps(job), capture_output=True, text=True)
    assert json.loads(done.stdout) == {"error": None}


@pytest.mark.parametrize(("template", "words"), [(ENDLESS, "for more than 10 s"), (LARGE["a text"], "takes more than")])
def test_the_device_is_not_asked_for(mini: MiniProject, template: str, words: str):
    """The step itself: the template is tried before the converter is fetched and before anything is launched."""
    mini.empty_base()
    recipe = load_recipe(mini.recipe_path())

    def base(step: Step) -> Made:
        (step.staging / "chat_template.jinja").write_text(template)
        return stand_in(step)

    def launch(task: Task, progress: Progress) -> dict[str, Any]:
        raise AssertionError("the device was asked for")

    for asset in ("raw_dataset", "dataset_info"):
        materialise(asset, recipe, mini, BODIES[asset], lambda event: None)
    materialise("base_model", recipe, mini, base, lambda event: None)
    began = time.monotonic()
    with pytest.raises(BadInput, match=words):
        materialise("lora_adapter", recipe, mini, LORA_ADAPTER.build, lambda event: None, launch=launch)
    assert time.monotonic() - began < 20
