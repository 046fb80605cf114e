"""Adapters that only PEFT can merge: what they are, that they are rounded once, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.export.merge.merge import merge
from finetune_assets.export.parity.merged import check
from finetune_assets.machine.device import choose_device
from finetune_assets.reporting.errors import BadInput, StepFailed
from tests.export.merge.test_merge import by_peft, load, logits, rewrite
from tests.support.export_fixtures import held_out_rows, tiny_adapter, tiny_base, tiny_tokenizer

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=512))


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4))


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "transposed": (gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"]}, "fan_in_fan_out is set"),
    "head of tied": (gpt2, {"target_modules": ["c_attn", "lm_head"]}, "base stores no tensor named lm_head.weight"),
    "experts": (mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}, "target_parameters is set"),
}


@pytest.mark.parametrize("dtype", ["auto", "float16"])
@pytest.mark.parametrize(("model", "lora", "reason"), KINDS.values(), ids=KINDS)
def test_a_16_bit_base_is_merged_in_float32_and_rounded_once(
    tmp_path: Path, model: Callable[[], Any], lora: dict[str, Any], reason: str, dtype: Any
) -> None:
    """PEFT alone rounds the base, the update and their sum: the check would take that for another model."""
    base = tmp_path / "base"
    torch.manual_seed(0)
    model().to(torch.bfloat16).save_pretrained(base)
    tiny_tokenizer(base)
    adapter = tiny_adapter(base, tmp_path / "adapter", **lora)
    report = merge(base, adapter, tmp_path / "out", export_size=5, export_dtype=dtype)
    assert (report["method"], report["reason"]) == ("peft", reason)
    ours = load(tmp_path / "out")
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16 if dtype == "auto" else torch.float16}
    found = check(base, adapter, tmp_path / "out", held_out_rows(tmp_path / "test.jsonl"), choose_device(kind="cpu"))
    if "lm_head" in lora["target_modules"]:
        # one tensor with the embeddings in PEFT's merge, which has both wrong
        assert found["weights_compared"] == report["tensors"] - 2
        return
    assert found["weights_compared"] == report["tensors"]
    if model is gpt2:
        exact = by_peft(base, adapter, torch.float32).state_dict()
        assert all(torch.equal(ours[key], exact[key].to(ours[key].dtype)) for key in ours)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_adapter_of_the_embeddings_leaves_the_head_alone(tmp_path: Path, tied: bool) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_base(tmp_path / "base", tied=tied)
    adapter = tiny_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    merge(base, adapter, tmp_path / "out", export_size=5, export_dtype="auto")
    tuned: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(logits(merged), logits(tuned), rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.lm_head.weight, tuned.get_base_model().lm_head.weight)


REFUSED = {
    "a key of a newer PEFT": ({"use_warp": True}, "does not know use_warp, which its configuration sets"),
    "a kind of a newer PEFT": ({"peft_type": "WARP"}, "does not know adapters of type WARP"),
    "a random decomposition": ({"init_lora_weights": "pissa_niter_4"}, "a random decomposition of the base"),
    "more layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication builds a model with other layers"),
    "no rank": ({"r": None}, "has rank 4, adapter_config.json says None"),
}


@pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=REFUSED)
def test_what_peft_would_pass_over_without_a_word(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    base = tiny_base(tmp_path / "base", tied=False)
    adapter = tiny_adapter(base, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_version": "0.99.0"} | changes))
    with pytest.raises(BadInput, match=words) as caught:
        merge(base, adapter, tmp_path / "out", export_size=5, export_dtype="auto")
    assert ("PEFT that wrote it (0.99.0)" in str(caught.value)) == ("newer PEFT" in words or "know" in words)


def test_a_prompt_is_no_change_of_weights(tmp_path: Path) -> None:
    from peft import PromptTuningConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tiny_base(tmp_path / "base", tied=False)
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(BadInput, match="does not change weights, so that it cannot be merged"):
        merge(base, tmp_path / "adapter", tmp_path / "out", export_size=5, export_dtype="auto")


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", tied=False)
    adapter = tiny_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    huge = Path(shutil.copytree(adapter, tmp_path / "huge"))
    rewrite(huge, lambda tensor: tensor * 1e4)
    with pytest.raises(StepFailed, match=r"(embed_tokens|q_proj)\.weight is not finite once merged"):
        merge(base, huge, tmp_path / "out", export_size=5, export_dtype="float16")
    rewrite(huge, lambda tensor: tensor * float("nan"))
    with pytest.raises(StepFailed, match="PEFT cannot merge it: NaNs detected"):
        merge(base, huge, tmp_path / "out", export_size=5, export_dtype="auto")
