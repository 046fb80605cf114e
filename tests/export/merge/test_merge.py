"""The streamed merge: PEFT's own arithmetic to the last bit, with one tensor in memory at a time."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.export.merge import blocks as merge_blocks
from finetune_assets.export.merge.merge import merge, refuse_quantised
from finetune_assets.reporting.errors import BadInput, StepFailed
from tests.support.events import json_into
from tests.support.export_fixtures import tiny_adapter, tiny_base

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: tiny_base(root / name, tied=name == "tied") for name in ("tied", "untied")}


def load(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {k: v for file in sorted(folder.glob("model*.safetensors")) for k, v in load_file(file).items()}


def by_peft(base: Path, adapter: Path, dtype: Any = "auto") -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)
    return model.merge_and_unload()


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(torch.arange(20).unsqueeze(0)).logits


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "patterns"])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_equals_peft_bit_for_bit(bases: dict[str, Path], tmp_path: Path, name: str, kind: str) -> None:
    lora: dict[str, Any] = {
        "lora": {},
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True, "lora_dropout": 0.1},
        "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 31}},
    }[kind]
    adapter = tiny_adapter(bases[name], tmp_path / "adapter", **lora)
    report = merge(bases[name], adapter, tmp_path / "out", export_size=5, export_dtype="auto")
    by_peft(bases[name], adapter).save_pretrained(tmp_path / "peft")
    ours, theirs = load(tmp_path / "out"), load(tmp_path / "peft")
    assert report["method"] == "streamed"
    assert report["merged"] == 14
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "peft/model.safetensors").read_bytes()
    changed = [key for key, value in load(bases[name]).items() if not torch.equal(value, ours[key])]
    assert len(changed) == 14


def test_shards_index_and_bytes(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = tiny_adapter(bases["untied"], tmp_path / "adapter")
    seen: list[dict[str, Any]] = []
    one = merge(
        bases["untied"], adapter, tmp_path / "one", export_size=5, export_dtype="auto", progress=json_into(seen)
    )
    many = merge(bases["untied"], adapter, tmp_path / "many", export_size=0.0001, export_dtype="auto")
    again = merge(bases["untied"], adapter, tmp_path / "again", export_size=0.0001, export_dtype="auto")
    assert seen[-1] == {"event": "step", "step": one["tensors"], "steps": one["tensors"]}
    assert len(many["shards"]) > 2
    assert many["shards"] == again["shards"]
    a, b = load(tmp_path / "one"), load(tmp_path / "many")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for file in sorted((tmp_path / "many").iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    from transformers import AutoModelForCausalLM

    sharded = AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    assert torch.equal(logits(sharded), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "one")))
    # A merged folder of several shards is itself a base.
    over = merge(tmp_path / "many", adapter, tmp_path / "over", export_size=5, export_dtype="auto")
    assert over["tensors"] == one["tensors"]


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_blocks_and_threads_change_no_bit(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any], dtype: Any
) -> None:
    adapter = tiny_adapter(bases["untied"], tmp_path / "adapter", **kind)
    threads = torch.get_num_threads()
    try:
        for name, count, block in (("whole", 1, 1 << 18), ("blocks", 3, 1 << 10)):
            torch.set_num_threads(count)
            monkeypatch.setattr(merge_blocks, "BLOCK", block)
            monkeypatch.setattr(merge_blocks, "PORTION", 4 * block)
            merge(bases["untied"], adapter, tmp_path / name, export_size=0.0001, export_dtype=dtype)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for file in sorted((tmp_path / "whole").iterdir()):
        assert file.read_bytes() == (tmp_path / "blocks" / file.name).read_bytes(), file.name


def test_a_file_system_that_cannot_copy_by_itself(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tiny_adapter(bases["untied"], tmp_path / "adapter", target_modules=["q_proj"])
    merge(bases["untied"], adapter, tmp_path / "kernel", export_size=5, export_dtype="auto")

    def refuse(*_: Any) -> int:
        raise OSError(errno.EOPNOTSUPP, "not on this file system")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    merge(bases["untied"], adapter, tmp_path / "ours", export_size=5, export_dtype="auto")
    ours, kernel = (tmp_path / name / "model.safetensors" for name in ("ours", "kernel"))
    assert ours.read_bytes() == kernel.read_bytes()


def test_a_disk_without_room_says_so_before_anything_is_computed(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tiny_adapter(bases["untied"], tmp_path / "adapter")
    asked: list[int] = []

    def full(_: int, offset: int, size: int) -> None:
        asked.append(offset + size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    seen: list[dict[str, Any]] = []
    with pytest.raises(OSError, match="No space left"):
        merge(bases["untied"], adapter, tmp_path / "out", export_size=5, export_dtype="auto", progress=json_into(seen))
    assert not seen
    assert asked == [(bases["untied"] / "model.safetensors").stat().st_size]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_is_cast_once_from_float32(bases: dict[str, Path], tmp_path: Path, dtype: Any) -> None:
    adapter = tiny_adapter(bases["tied"], tmp_path / "adapter")
    merge(bases["tied"], adapter, tmp_path / "out", export_size=5, export_dtype=dtype)
    exact = by_peft(bases["tied"], adapter).state_dict()
    ours = load(tmp_path / "out")
    assert all(torch.equal(ours[k], exact[k].to(getattr(torch, dtype))) for k in ours)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("kind", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_a_16_bit_base_is_computed_in_float32_and_rounded_once(tmp_path: Path, kind: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    wide = tiny_base(tmp_path / "float32", tied=False)
    AutoModelForCausalLM.from_pretrained(wide, dtype=torch.bfloat16).save_pretrained(base)
    adapter = tiny_adapter(base, tmp_path / "adapter", **kind)
    merge(base, adapter, tmp_path / "out", export_size=5, export_dtype="auto")
    exact, ours = by_peft(base, adapter, torch.float32).state_dict(), load(tmp_path / "out")
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    assert ours.keys() == exact.keys() and all(torch.equal(ours[k], exact[k].bfloat16()) for k in ours)


def test_companions_and_stop_tokens(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = tiny_adapter(bases["tied"], tmp_path / "adapter")
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "README.md").write_text("not this one")
    merge(bases["tied"], adapter, tmp_path / "out", export_size=5, export_dtype="auto")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "model.safetensors", "config.json", "generation_config.json",
        "tokenizer.json", "chat_template.jinja", "chat.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize(("own", "merged"), [(None, [2]), (2, [2]), (0, [2, 0]), ([1, 2], [2, 1])])
def test_what_ended_answers_of_the_base_still_does(
    bases: dict[str, Path], tmp_path: Path, own: int | list[int] | None, merged: list[int]
) -> None:
    base = shutil.copytree(bases["tied"], tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": own, "top_p": 0.5}))
    merge(base, tiny_adapter(base, tmp_path / "adapter"), tmp_path / "out", export_size=5, export_dtype="auto")
    said = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert said == {"eos_token_id": merged, "top_p": 0.5}


APART = {
    "head saved": {"modules_to_save": ["lm_head"]},
    "embeddings saved": {"modules_to_save": ["embed_tokens"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "adapter on the head": {"target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.parametrize("kind", APART.values(), ids=APART)
def test_tied_embeddings_are_untied_where_one_was_trained(
    bases: dict[str, Path], tmp_path: Path, kind: dict[str, Any]
) -> None:
    """PEFT would write the head's change into the input embeddings too, or lose it when the model is saved."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = tiny_adapter(bases["tied"], tmp_path / "adapter", **kind)
    merge(bases["tied"], adapter, tmp_path / "out", export_size=5, export_dtype="auto")
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["tied"]), adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.tie_word_embeddings is False
    assert merged.lm_head.weight.data_ptr() != merged.model.embed_tokens.weight.data_ptr()
    torch.testing.assert_close(logits(merged), logits(tuned), rtol=1e-4, atol=1e-5)


def test_embeddings_are_two_tensors_where_two_differ_whatever_the_configuration_says(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """transformers then trains them as two, with a warning that nobody reads."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    base = Path(shutil.copytree(bases["tied"], tmp_path / "base"))
    stored = load(base)
    embeddings = stored["model.embed_tokens.weight"]
    for name, head in {"same": embeddings.clone(), "other": embeddings * 1.5}.items():
        save_file(stored | {"lm_head.weight": head}, base / "model.safetensors", {"format": "pt"})
        adapter = tiny_adapter(base, tmp_path / f"{name} adapter")
        merge(base, adapter, tmp_path / name, export_size=5, export_dtype="auto")
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["tie_word_embeddings"] is (name == "same")
        assert ("lm_head.weight" in load(tmp_path / name)) == (name == "other")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        torch.testing.assert_close(logits(merged), logits(by_peft(base, adapter)), rtol=1e-4, atol=1e-5)


ADDED: dict[str, tuple[dict[str, Any], bool]] = {  # kind of adapter, and whether tied embeddings stay so
    "adapter": ({}, True),
    "both saved": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "embeddings saved": ({"modules_to_save": ["embed_tokens"]}, False),
    "saved as one": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "adapter on the head": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "their rows": ({"target_modules": ["q_proj"], "trainable_token_indices": [320, 321]}, True),
}


@pytest.mark.parametrize(("kind", "one"), ADDED.values(), ids=ADDED)
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_added_tokens(bases: dict[str, Path], tmp_path: Path, name: str, kind: dict[str, Any], one: bool) -> None:
    """PEFT saves the larger embeddings with the adapter, under several names. They belong to the larger base only."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(bases[name])
    network.resize_token_embeddings(330)
    network.save_pretrained(tmp_path / "larger")
    settings: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model: Any = get_peft_model(network, LoraConfig(**(settings | kind)))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.1
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    merge(tmp_path / "larger", adapter, tmp_path / "out", export_size=5, export_dtype="auto")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.vocab_size == len(merged.lm_head.weight) == 330
    with torch.no_grad():
        every = torch.arange(330).unsqueeze(0)
        torch.testing.assert_close(merged(every).logits, model.eval()(every).logits, rtol=1e-4, atol=1e-5)
    assert merged.config.tie_word_embeddings is (name == "tied" and one)
    with pytest.raises(BadInput, match=r"has 330 tokens, .*tied has 320") as caught:
        merge(bases[name], adapter, tmp_path / "no", export_size=5, export_dtype="auto")
    assert "add them to the base model" in str(caught.value)


def test_modules_to_save_take_the_place_of_the_base_weights(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = tiny_adapter(bases["untied"], tmp_path / "adapter", modules_to_save=["lm_head", "embed_tokens"])
    report = merge(bases["untied"], adapter, tmp_path / "out", export_size=5, export_dtype="auto")
    assert report["replaced"] == ["lm_head.weight", "model.embed_tokens.weight"]
    exact, ours = by_peft(bases["untied"], adapter).state_dict(), load(tmp_path / "out")
    assert ours.keys() == exact.keys() and all(torch.equal(ours[k], exact[k]) for k in ours)


OTHERS = {
    "embeddings": (
        {"target_modules": ["embed_tokens", "q_proj"]},
        r"^the adapter holds .*embed_tokens\.lora_embedding_A$",
    ),
    "lora_bias": ({"lora_bias": True, "target_modules": ["q_proj"]}, "^lora_bias is set$"),
    "bias": ({"bias": "lora_only", "target_modules": ["q_proj"]}, r"^trained biases \(bias: lora_only\)$"),
    "pissa": ({"init_lora_weights": "pissa"}, "^init_lora_weights: pissa changes the base weights$"),
    "tokens": ({"trainable_token_indices": [3, 5]}, "^trainable_token_indices is set$"),
}


@pytest.mark.parametrize(("kind", "reason"), OTHERS.values(), ids=OTHERS)
def test_other_adapters_go_through_peft_and_say_why(
    bases: dict[str, Path], tmp_path: Path, kind: dict[str, Any], reason: str
) -> None:
    base = tiny_base(tmp_path / "biased", tied=False, attention_bias=True) if "bias" in str(kind) else bases["untied"]
    adapter = tiny_adapter(base, tmp_path / "adapter", **kind)
    report = merge(base, adapter, tmp_path / "out", export_size=5, export_dtype="auto")
    assert report["method"] == "peft"
    assert re.search(reason, report["reason"]), report["reason"]
    exact, ours = by_peft(base, adapter).state_dict(), load(tmp_path / "out")
    assert ours.keys() == exact.keys() and all(torch.equal(ours[k], exact[k]) for k in ours)


def test_another_kind_of_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    from peft import IA3Config, get_peft_model
    from transformers import AutoModelForCausalLM

    config = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(bases["untied"]), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    model.save_pretrained(tmp_path / "adapter")
    report = merge(bases["untied"], tmp_path / "adapter", tmp_path / "out", export_size=5, export_dtype="auto")
    assert (report["method"], report["reason"]) == ("peft", "adapter type IA3")
    exact, ours = by_peft(bases["untied"], tmp_path / "adapter").state_dict(), load(tmp_path / "out")
    assert ours.keys() == exact.keys() and all(torch.equal(ours[k], exact[k]) for k in ours)


def test_refusals_say_why(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = tiny_adapter(bases["tied"], tmp_path / "adapter")

    def fails(kind: type[Exception], base: Path, lora: Path, words: str, **options: Any) -> None:
        with pytest.raises(kind, match=words):
            merge(base, lora, tmp_path / "out", **({"export_size": 5, "export_dtype": "auto"} | options))

    quantised = Path(shutil.copytree(bases["tied"], tmp_path / "quantised"))
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    fails(BadInput, quantised, adapter, "quantised \\(gptq\\)")
    wide = tiny_base(tmp_path / "wide", tied=True, hidden_size=32)
    fails(BadInput, wide, adapter, "another base model")
    shallow = tiny_base(tmp_path / "shallow", tied=True, num_hidden_layers=1)
    fails(BadInput, shallow, adapter, "another base model")
    broken = Path(shutil.copytree(adapter, tmp_path / "broken"))
    (broken / "adapter_model.safetensors").write_bytes(b"short")
    fails(StepFailed, bases["tied"], broken, "cannot read .*adapter_model.safetensors|is not a safetensors file")
    fails(StepFailed, bases["tied"], tmp_path, "adapter_config.json is missing")
    (bases["tied"].parent / "empty").mkdir()
    shutil.copy(bases["tied"] / "config.json", bases["tied"].parent / "empty")
    fails(StepFailed, bases["tied"].parent / "empty", adapter, "has no model.safetensors")
    nan = Path(shutil.copytree(adapter, tmp_path / "nan"))
    rewrite(nan, lambda tensor: tensor * float("nan"))
    fails(StepFailed, bases["tied"], nan, "NaN")
    huge = Path(shutil.copytree(adapter, tmp_path / "huge"))
    rewrite(huge, lambda tensor: tensor * 1e4)
    fails(StepFailed, bases["tied"], huge, "does not fit float16", export_dtype="float16")


CONFIGURED = {
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "load_in_4bit": {"quantization_config": {"load_in_4bit": True}},
    '"bits": 4': {"quantization": {"group_size": 64, "bits": 4}},
    "compressed-tensors": {"compression_config": {"quant_method": "compressed-tensors"}},
    "awq": {"text_config": {"quantization_config": {"quant_method": "awq"}}},
}


@pytest.mark.parametrize(("method", "said"), CONFIGURED.items(), ids=CONFIGURED)
def test_a_base_that_says_it_is_quantised(bases: dict[str, Path], tmp_path: Path, method: str, said: Any) -> None:
    config = json.loads((bases["tied"] / "config.json").read_text())
    with pytest.raises(BadInput, match=f"is quantised \\(.*{method}"):
        refuse_quantised(config | said, tmp_path)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("q_proj.qweight", "int32"), ("q_proj.weight", "uint8"), ("q_proj.weight", "int8"), ("q_proj.W_q", "uint8"),
     ("q_proj.weight", "float8_e4m3fn"), ("q_proj.weight_packed", "int32"), ("experts.down_proj_blocks", "uint8")],
)  # fmt: skip
def test_a_base_that_is_quantised_and_does_not_say_so(tmp_path: Path, name: str, dtype: str) -> None:
    """As AutoGPTQ wrote them, and whoever takes the configuration from another model."""
    from safetensors.torch import save_file

    rest = {"embed_tokens.weight": torch.ones(4, 4), "position_ids": torch.arange(4), "attn.bias": torch.ones(4) > 0}
    save_file(rest, tmp_path / "model.safetensors")
    refuse_quantised({}, tmp_path)
    save_file(rest | {f"layers.0.{name}": torch.zeros(4, 4).to(getattr(torch, dtype))}, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=rf"is quantised \(layers\.0\.{name} is stored as "):
        refuse_quantised({}, tmp_path)


def rewrite(adapter: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {key: change(value) for key, value in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
