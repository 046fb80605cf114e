"""A merged model that is not base + adapter is found out, whatever was done to it; a right one passes in any dtype."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.assets.merged_model import MERGED_MODEL
from finetune_assets.export.merge.merge import merge
from finetune_assets.export.parity.held_out import choose, logits
from finetune_assets.export.parity.merged import CONVERSATIONS, LIMITS, LONGEST, POINTS, check
from finetune_assets.lineage.materialise import Step
from finetune_assets.machine.device import choose_device
from finetune_assets.models.loading import load_chat, load_model
from finetune_assets.recipe import ExportSection, ModelSection
from finetune_assets.recipe.file import load_recipe
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.store.artifact import Artifact
from finetune_assets.worker import launch
from finetune_assets.worker.protocol import read_task
from finetune_assets.worker.tasks.task import Task
from tests.conftest import MiniProject
from tests.support.export_fixtures import tiny_adapter, tiny_base, tiny_tokenizer

torch = pytest.importorskip("torch")
ROW = {
    "id": "0",
    "dataset": "x",
    "messages": [{"role": "user", "content": "hello you"}, {"role": "assistant", "content": "hello, you there!"}],
}
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tiny_base(tmp_path_factory.mktemp("base") / "base", tied=request.param)
    tiny_tokenizer(folder)
    return folder


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps(ROW) + "\n")
    return file


def merged(base: Path, adapter: Path, out: Path, dtype: Any = "auto") -> Path:
    merge(base, adapter, out, export_size=5, export_dtype=dtype)
    return out


def compare(base: Path, adapter: Path, out: Path, held_out: Path) -> dict[str, Any]:
    return check(base, adapter, out, held_out, choose_device(kind="cpu"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], file: str = "model.safetensors") -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})


def changed(base: Path, adapter: Path, held_out: Path) -> float:
    """Mean KL(base + adapter || base), nats, of two models that are loaded one by one."""
    from torch.nn.functional import kl_div

    chosen = choose(held_out, load_chat(base), conversations=CONVERSATIONS, points=POINTS, longest=LONGEST)
    after, before = (
        torch.cat(logits(load_model(base, given, choose_device(kind="cpu")), chosen)).log_softmax(-1)
        for given in (adapter, None)
    )
    return float(kl_div(before, after, log_target=True, reduction="batchmean"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "head"])
def test_a_right_merge_passes(base: Path, tmp_path: Path, held_out: Path, kind: str, dtype: str) -> None:
    lora = {
        "lora": {},
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "head": {"target_modules": ["lm_head", "q_proj"]},
    }
    adapter = tiny_adapter(base, tmp_path / "adapter", **lora[kind])
    found = compare(base, adapter, merged(base, adapter, tmp_path / "out", dtype), held_out)
    stored = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    assert found["difference"] < found["allowed"] == LIMITS[stored]
    assert found["effect"] > found["allowed"]
    assert found["kl_from_base"] == pytest.approx(changed(base, adapter, held_out), rel=0.01)
    assert found["places"] > 0
    assert found["weights_compared"] >= 19


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_layer_left_out_is_named(base: Path, tmp_path: Path, held_out: Path, dtype: str) -> None:
    adapter = tiny_adapter(base, tmp_path / "adapter")
    # an adapter that has hardly learnt: one layer of it is less than the rounding of the logits
    rewrite(adapter, lambda lora: lora.update({k: v * 0.05 for k, v in lora.items()}), "adapter_model.safetensors")
    out = merged(base, adapter, tmp_path / "out", dtype)
    compare(base, adapter, out, held_out)

    def leave_out(tensors: dict[str, Any]) -> None:
        from safetensors.torch import load_file

        tensors[UP] = load_file(base / "model.safetensors")[UP].to(tensors[UP].dtype)

    rewrite(out, leave_out)
    with pytest.raises(StepFailed, match=f"check weights: {UP}") as caught:
        compare(base, adapter, out, held_out)
    assert ("check logits" in caught.value.message) == (dtype == "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_scale(base: Path, tmp_path: Path, held_out: Path, dtype: str) -> None:
    adapter = tiny_adapter(base, tmp_path / "adapter")
    louder = Path(shutil.copytree(adapter, tmp_path / "louder"))
    config = json.loads((louder / "adapter_config.json").read_text())
    (louder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    with pytest.raises(StepFailed, match=r"check logits: .*\n  check weights: "):
        compare(base, adapter, merged(base, louder, tmp_path / "out", dtype), held_out)


def test_the_adapter_of_another_base(base: Path, tmp_path: Path, held_out: Path) -> None:
    other = tiny_base(
        tmp_path / "other", tied=json.loads((base / "config.json").read_text())["tie_word_embeddings"], seed=5
    )
    tiny_tokenizer(other)
    adapter = tiny_adapter(base, tmp_path / "adapter")
    with pytest.raises(StepFailed, match="check logits: "):
        compare(base, adapter, merged(other, adapter, tmp_path / "out"), held_out)


def test_a_copied_weight_that_changed_on_the_way(base: Path, tmp_path: Path, held_out: Path) -> None:
    adapter = tiny_adapter(base, tmp_path / "adapter")
    out = merged(base, adapter, tmp_path / "out")
    rewrite(out, lambda tensors: tensors["model.layers.0.input_layernorm.weight"][3:4].mul_(1.00001))
    with pytest.raises(StepFailed, match=r"check weights: model\.layers\.0\.input_layernorm\.weight"):
        compare(base, adapter, out, held_out)


def test_an_expert_that_is_another_s(tmp_path: Path, held_out: Path) -> None:
    """transformers holds the experts of a layer in one tensor; files have one each."""
    from transformers import MixtralConfig, MixtralForCausalLM

    shape: dict[str, Any] = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    config = MixtralConfig(**shape, num_attention_heads=4, num_key_value_heads=2, num_local_experts=8)
    base = tmp_path / "base"
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    tiny_tokenizer(base)
    adapter = tiny_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "o_proj"])
    out = merged(base, adapter, tmp_path / "out")
    found = compare(base, adapter, out, held_out)
    assert found["weights_compared"] == 8 * 3 + 4 + 2 + 3 + 1, "experts, attention, norms, embeddings, the router"
    expert = "model.layers.0.block_sparse_moe.experts.{}.w3.weight"
    rewrite(out, lambda tensors: tensors.update({expert.format(5): tensors[expert.format(4)].clone()}))
    with pytest.raises(StepFailed, match=r"check weights: model\.layers\.0\.block_sparse_moe\.experts\.5\.w3"):
        compare(base, adapter, out, held_out)


def test_in_the_worker_with_sentences_of_our_own(base: Path, tmp_path: Path) -> None:
    adapter, out, held_out = tiny_adapter(base, tmp_path / "adapter"), tmp_path / "out", tmp_path / "test.jsonl"
    out.mkdir()
    held_out.write_text("")
    folders = {"base": str(base), "adapter": str(adapter), "out": str(out), "held_out": str(held_out)}
    sections = {"model": ModelSection(model_name_or_path="org/tiny"), "export": ExportSection()}
    job = {**folders, **{name: section.model_dump() for name, section in sections.items()}}
    report = launch.run(read_task({**job, "task": "merge", "device": "cpu"}), lambda event: None)
    assert report["method"] == "streamed"
    assert report["check"] == compare(base, adapter, out, held_out)


def test_an_adapter_that_was_trained_on_an_earlier_base_is_not_merged(mini: MiniProject) -> None:
    """Where only merged_model is asked for, its inputs are the last ones made, whatever they were made of."""
    mini.empty_base()
    made = {
        "lora_adapter": {"fingerprint": "aa", "ingredients": {"upstreams": {"base_model": "the earlier one"}}},
        "base_model": {"fingerprint": "bb", "data_version": "today's"},
        "dataset_info": {},
    }
    inputs = {name: Artifact(mini.store / name, manifest) for name, manifest in made.items()}
    step = Step(load_recipe(mini.recipe_path()), mini, inputs, mini.root, None, {}, lambda event: None, started)
    with pytest.raises(StepFailed, match="mini/lora_adapter aa was trained on a different base model than bb"):
        MERGED_MODEL.build(step)


def started(task: Task) -> dict[str, Any]:
    raise AssertionError(f"{task.task} was started")
