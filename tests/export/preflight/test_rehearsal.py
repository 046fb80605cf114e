"""llama.cpp is asked whether it will read prompts as training does, before anything is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.export.gguf.converter import convert_vocabulary
from finetune_assets.export.preflight.prompts import rehearse
from finetune_assets.recipe import ModelSection
from finetune_assets.reporting.errors import BadInput, StepFailed
from finetune_assets.worker import launch
from finetune_assets.worker.protocol import read_task
from tests.support.events import json_into
from tests.support.export_fixtures import CHATML, converter_cache

TALK = [
    {"role": "system", "content": "Be brief. 简短。"},
    {"role": "user", "content": 'Say "{{ no }}" \n\n<b>12345</b> 🙂'},
    {"role": "assistant", "content": "no"},
    {"role": "user", "content": "你是谁？"},
    {"role": "assistant", "content": "我是米赞。"},
]


@pytest.fixture(scope="module")
def vocabulary(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    file = tmp_path_factory.mktemp("vocabulary") / "tiny.gguf"
    convert_vocabulary(tiny_base, file, converter_cache(request.config))
    return file


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "train.jsonl"
    file.write_text(
        json.dumps({"id": "0", "dataset": "x", "messages": TALK}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return file


def section(**values: Any) -> ModelSection:
    return ModelSection.model_validate({"model_name_or_path": "./base", **values})


def swapped(tiny_base: Path, folder: Path) -> Path:
    """A base whose tokenizer.json has two words in each other's place."""
    base = shutil.copytree(tiny_base, folder / "base")
    content = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    words["user"], words["e"] = words["e"], words["user"]
    (base / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return base


@pytest.mark.parametrize("template", ["auto", "chatml"])
def test_a_good_base_passes(vocabulary: Path, tiny_base: Path, rows: Path, template: str) -> None:
    rehearse(vocabulary, tiny_base, rows, section(template=template, default_system="You are Ada."))
    rows.write_text("")
    rehearse(vocabulary, tiny_base, rows, section(template=template))


def test_another_tokenizer_is_noticed(vocabulary: Path, tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=r"would not read .* as training does:\n  check prompt ids: \d+ ids") as caught:
        rehearse(vocabulary, swapped(tiny_base, tmp_path), rows, section())
    assert str(caught.value.hint).startswith("nothing was trained")


def test_a_template_that_does_not_fit_the_base(vocabulary: Path, tiny_base: Path, rows: Path) -> None:
    with pytest.raises(BadInput, match="which the base model does not have"):
        rehearse(vocabulary, tiny_base, rows, section(template="llama3"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            "{{ 'again: ' if loop.index > 4 and message.role == 'user' }}",
            "the chat template writes the same kind of turn in more than one way",
        ),
        (
            "{{ '[none]' if tools is not defined and 'three' in message['content'] }}",
            "current Ollama servers render this chat template otherwise than training does: it writes",
        ),
    ],
)
def test_a_template_that_servers_do_not_follow(
    vocabulary: Path, tiny_base: Path, rows: Path, tmp_path: Path, change: str, why: str
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "chat_template.jinja").write_text(CHATML.replace("%}", f"%}}{change}", 1), encoding="utf-8")
    with pytest.raises(StepFailed, match=why) as caught:
        rehearse(vocabulary, base, rows, section())
    assert str(caught.value.hint).startswith("nothing was trained; name a chat template")
    rehearse(vocabulary, base, rows, section(template="chatml"))


def test_a_date_is_the_same_in_training_and_serving(
    vocabulary: Path, tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    dated = "{% for tool in tools or [] %}{% endfor %}{{ date_string | default('26 Jul 2024') }}" + CHATML
    (base / "chat_template.jinja").write_text(dated, encoding="utf-8")
    rehearse(vocabulary, base, rows, section())


def test_the_worker_trains_nothing_then(vocabulary: Path, tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    job = {
        "task": "train", "base": str(swapped(tiny_base, tmp_path)), "rows": str(rows), "validation": None,
        "vocabulary": str(vocabulary), "out": str(out), "train": {}, "model": section().model_dump(), "device": "cpu",
    }  # fmt: skip
    events: list[dict[str, Any]] = []
    with pytest.raises(StepFailed, match="would not read this model's prompts as training does"):
        launch.run(read_task(job), json_into(events))
    assert not list(out.iterdir()) and [event["event"] for event in events] == ["message"]
