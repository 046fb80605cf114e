"""Published chat templates, and a model of bytes to render them with: each token is one byte, so counts are lengths."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from finetune_assets.export.gguf.bare_file import CONTEXT, WIDTH

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}


def published(llama_cpp: Path | None = None) -> dict[str, str]:
    """Name -> chat template of a family of models, as TRL brings them and llama.cpp tests with.

    Args:
        llama_cpp: folder models/templates of llama.cpp's sources, if at hand.
    """
    files = {f"trl/{file.stem}": file for file in Path(str(resources.files("trl"))).glob("chat_templates/*.jinja")}
    if llama_cpp is not None:
        files |= {f"llama.cpp/{file.stem}": file for file in llama_cpp.glob("*.jinja")}
    return {name: files[name].read_text(encoding="utf-8") for name in sorted(files, key=str.lower)}


def letters_file(file: Path, template: str, architecture: str = "llama", *, context: int = CONTEXT) -> Path:
    """A GGUF file of a random model that an old Ollama runs, too, whose tokens are the 256 bytes, <s> and </s>."""
    writer = GGUFWriter(file, architecture)
    writer.add_context_length(context)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(WIDTH)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = add_letters(writer, template, [*SPECIALS.values()])
    random = np.random.default_rng(0)
    writer.add_tensor("token_embd.weight", random.standard_normal((tokens, WIDTH), np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", random.standard_normal((WIDTH, WIDTH), np.float32) / 8)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_letters(writer: GGUFWriter, template: str, specials: list[str]) -> int:
    """Write a tokenizer of bytes, with a chat template; returns the number of its tokens.

    Args:
        specials: texts of further tokens. The last two begin and end a text, and are not added to prompts.
    """
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = [*_bytes(), *specials]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * len(specials))
    writer.add_token_merges(["a b"])  # there has to be one; it makes no token
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(template)
    return len(tokens)


def _bytes() -> list[str]:
    """GPT-2's names of the bytes 0 to 255."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(number) if number in plain else chr(next(others)) for number in range(256)]
