"""Nothing is trained on a base model that could not be exported afterwards."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.assets.base_model import BASE_MODEL
from finetune_assets.assets.dataset_info import DATASET_INFO
from finetune_assets.assets.lora_adapter import LORA_ADAPTER
from finetune_assets.assets.raw_dataset import RAW_DATASET
from finetune_assets.export.gguf import converter
from finetune_assets.export.preflight.exportable import check_exportable
from finetune_assets.lineage.materialise import materialise
from finetune_assets.models.formats.gguf import read_head
from finetune_assets.recipe.file import load_recipe
from finetune_assets.reporting.errors import BadInput, FinetuneError, StepFailed
from finetune_assets.reporting.events import Progress
from finetune_assets.worker.tasks.task import Task
from finetune_assets.worker.tasks.train import Train
from tests.conftest import MiniProject, make_mini
from tests.support.events import json_into
from tests.support.export_fixtures import converter_cache


@pytest.fixture
def trainable(tmp_path: Path, tiny_base: Path, request: pytest.FixtureRequest) -> MiniProject:
    project = make_mini(tmp_path, tiny_base)
    project.cache.mkdir(parents=True)
    (project.cache / f"{converter.PACKAGE}-{converter.VERSION}").symlink_to(
        converter.converter_dir(converter_cache(request.config))
    )
    return project


class Trained(Exception):
    """The training was started."""


def start_training(project: MiniProject) -> list[str]:
    """Everything up to the moment at which training starts; what was said on the way."""

    def launch(task: Task, progress: Progress) -> dict[str, Any]:
        assert isinstance(task, Train) and task.vocabulary is not None
        assert read_head(task.vocabulary).get("tokenizer.ggml.tokens"), "llama.cpp is asked by it"
        raise Trained

    events: list[dict[str, Any]] = []
    recipe = load_recipe(project.recipe_path())
    with pytest.raises(Trained):
        for step in (RAW_DATASET, DATASET_INFO, BASE_MODEL, LORA_ADAPTER):
            materialise(step.name, recipe, project, step.build, json_into(events), launch=launch)
    return [event.get("text", "") for event in events]


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def refused(project: MiniProject, kind: type[FinetuneError], *words: str) -> None:
    """Training is not reached, for this reason."""
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        start_training(project)
    assert all(word in caught.value.message for word in words), caught.value.message
    assert time.monotonic() - started < 60
    assert not list((project.store / "mini").glob("lora_adapter/*/manifest.json"))


def test_an_architecture_that_the_converter_does_not_know(trainable: MiniProject) -> None:
    edit(trainable.root / "base" / "config.json", lambda config: config.update(architectures=["StrangeForCausalLM"]))
    refused(trainable, StepFailed, "architecture StrangeForCausalLM", f"{converter.PACKAGE}=={converter.VERSION}")


def test_a_tokenizer_that_the_converter_does_not_know(trainable: MiniProject) -> None:
    def split_otherwise(tokenizer: dict[str, Any]) -> None:
        digits = {"type": "Digits", "individual_digits": False}
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, tokenizer["pre_tokenizer"]]}
        tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:1000]

    edit(trainable.root / "base" / "tokenizer.json", split_otherwise)
    refused(trainable, StepFailed, "does not know the tokenizer", "(hash ", f"{converter.PACKAGE}=={converter.VERSION}")


def test_what_the_pinned_converter_knows_and_an_older_one_does_not(
    trainable: MiniProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = tmp_path / "older"
    older.mkdir()
    words = "ERROR:hf-to-gguf:Model LlamaForCausalLM is not supported"  # as the real one says in the tests above
    (older / converter.SCRIPT).write_text(f"raise SystemExit({words!r})\n")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(older))
    with pytest.raises(StepFailed, match=r"\(llama.cpp checkout .*\) does not know .* LlamaForCausalLM") as caught:
        check_exportable(trainable.root / "base", "tiny", trainable.cache, lambda event: None)
    assert (
        caught.value.hint
        == f"llama.cpp b10605 ({converter.PACKAGE}=={converter.VERSION}) knows it: unset LLAMA_CPP_DIR to use that"
    )


def test_a_quantised_base(trainable: MiniProject) -> None:
    quantised = {"quantization_config": {"quant_method": "gptq"}}
    edit(trainable.root / "base" / "config.json", lambda config: config.update(quantised))
    refused(trainable, BadInput, "quantised (gptq)")


def test_a_known_base_is_asked_for_once(trainable: MiniProject, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = "asking llama.cpp's converter whether it knows the base model"
    assert asked in start_training(trainable)
    assert asked not in start_training(trainable)
    # another converter may know less
    monkeypatch.setenv("LLAMA_CPP_DIR", str(converter.converter_dir(trainable.cache)))
    assert asked in start_training(trainable)


@pytest.mark.real
def test_the_demo_s_base_passes(smollm2: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (tmp_path / f"{converter.PACKAGE}-{converter.VERSION}").symlink_to(
        converter.converter_dir(converter_cache(request.config))
    )
    said: list[dict[str, Any]] = []
    for _ in range(2):
        check_exportable(smollm2, "smollm2", tmp_path, json_into(said))
    assert len(said) == 1
