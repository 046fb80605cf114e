"""A GGUF file with a model's tokenizer and chat template but almost no weights, which llama.cpp loads at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from finetune_assets.models.formats.gguf import Head, read_head, write_with_head

WIDTH = 32  # of the body: one layer, one head
CONTEXT = 64
TOKENIZER = "tokenizer."  # begins the keys of its metadata


def write_bare(head: Head, file: Path) -> None:
    """Write a model that tokenises as a model with this head does, and has no trained weights."""
    body = file.with_name(f"{file.stem}-body.gguf")
    _write_body(body, len(head.get("tokenizer.ggml.tokens", [])))
    own = {key: value for key, value in head.raw.items() if key.startswith(TOKENIZER)}
    bare = read_head(body)
    write_with_head(body, replace(bare, raw=bare.raw | own), file)
    body.unlink()


def _write_body(file: Path, tokens: int) -> None:
    """Write a Llama of one layer whose weights are all zero."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((tokens, WIDTH), np.float16))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((WIDTH, WIDTH), np.float16))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.zeros(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
