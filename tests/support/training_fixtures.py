"""A tiny tokenizer and a tiny random Llama: real classes, no download, made in a moment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_assets.machine.device import Device
from finetune_assets.recipe import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip
TEXTS = [
    "system user assistant Who are you? I am Mizan, a helpful assistant.\n\nWhat is the capital of France?",
    "你是谁？我是米赞，一个金融助手。你叫什么名字？",
] * 20


@lru_cache(maxsize=1)
def _tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 400 entries; knows the special tokens of ChatML and Llama 3."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        bos_token="<|begin_of_text|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_base(folder: Path, template: str | None = None) -> Path:
    """A base model: a random Llama (2 layers, hidden 32) with the tiny tokenizer, saved as the Hub has them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from finetune_assets.chat.named_templates import CHATML

    tokenizer = tiny_tokenizer(template or CHATML)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
            bos_token_id=3, eos_token_id=0, pad_token_id=0,
            initializer_range=0.3,  # wide enough that an adapter alone can learn a sentence
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat(*contents: str) -> list[dict[str, str]]:
    """user, assistant, user, assistant, ..."""
    return [
        {"role": "assistant" if place % 2 else "user", "content": content} for place, content in enumerate(contents)
    ]


def write_rows(path: Path, conversations: Sequence[list[dict[str, str]]]) -> Path:
    """Rows as the data room writes them."""
    with path.open("w", encoding="utf-8") as lines:
        for number, messages in enumerate(conversations):
            row = {"id": f"{number:016x}", "dataset": "test", "messages": messages}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


CPU = Device("cpu", "fp32", "test CPU", 8.0)
MODEL = ModelSection.model_validate({"model_name_or_path": "org/tiny", "default_system": "You are kind."})
ROWS = [
    chat("Who are you?", "I am Mizan."),
    chat("你是谁？", "我是米赞。"),
    chat("What is the capital of France?", "Paris."),
    chat("Hi", "Hello!", "What is your name?", "Mizan."),
    chat("Say it all: " + "helpful assistant " * 12, "I am Mizan, a helpful assistant."),
    chat("Thanks", "You are welcome."),
]
