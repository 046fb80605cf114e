"""Whether llama.cpp will read prompts as training does, asked before anything is trained.

What decides it is the tokenizer's metadata and the chat template, so a file of these on a body of next to no weights
answers as the finished model's file would.
"""

from __future__ import annotations

import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from finetune_assets.chat.decoding import Chat
from finetune_assets.chat.template import resolve_template, stop_tokens
from finetune_assets.chat.tokenizer import load_tokenizer
from finetune_assets.errors import StepFailed
from finetune_assets.export.chat_metadata import corrected
from finetune_assets.export.exact_checks import check_prompt
from finetune_assets.export.gguf_file import STRING, Head, read_head, write_with_head
from finetune_assets.export.held_out import choose
from finetune_assets.export.probe import ProbeEngine
from finetune_assets.recipe import ModelSection

WIDTH = 32  # of the body: one layer, one head
CONTEXT = 64
TOKENIZER = "tokenizer."  # begins the names of what belongs to it


def rehearse(vocabulary: Path, base: Path, rows: Path, model: ModelSection) -> None:
    """Compare the ids of prompts.

    Args:
        vocabulary: a GGUF file of the base model's tokenizer, without weights.
        base: Hugging Face folder.
        rows: conversations (.jsonl), of which a few are rendered; where it has none, a few sentences of our own.
        model: says which chat template is trained with.

    Raises:
        BadInput: the chat template cannot be had, or does not take the rows.
        StepFailed: the two read a prompt otherwise; the message says which ids.
    """
    tokenizer = load_tokenizer(base, trust_remote_code=model.trust_remote_code)
    tokenizer.chat_template = resolve_template(model.template, tokenizer)
    chat = Chat(tokenizer, model.default_system, stop_tokens(tokenizer, tokenizer.chat_template))
    bos = tokenizer.bos_token_id
    with tempfile.TemporaryDirectory(prefix="finetune-rehearsal-") as temporary:
        file = Path(temporary) / "rehearsal.gguf"
        _write(vocabulary, chat, file)
        with closing(ProbeEngine(file, num_ctx=CONTEXT, letter=0)) as engine:
            for conversation in choose(rows, chat):
                turns, ids = conversation.prompt
                if failures := check_prompt(ids, engine.prompt_ids(turns), None, bos if isinstance(bos, int) else None):
                    listing = "\n".join(f"  check {failure}" for failure in failures)
                    raise StepFailed(
                        f"llama.cpp would not read this model's prompts as training does:\n{listing}",
                        "nothing was trained; another model.template may help, or the base model's tokenizer files "
                        "do not belong together",
                    )


def _write(vocabulary: Path, chat: Chat, file: Path) -> None:
    body = file.with_name("body.gguf")
    head = read_head(vocabulary)
    _write_body(body, len(head.get("tokenizer.ggml.tokens", [])))
    own = {key: value for key, value in head.raw.items() if key.startswith(TOKENIZER)}
    bare = read_head(body)
    named: Head = replace(bare, raw=bare.raw | own)
    template = named.with_value("tokenizer.chat_template", STRING, str(chat.tokenizer.chat_template))
    write_with_head(body, corrected(template, chat.stop_token_ids), file)


def _write_body(file: Path, tokens: int) -> None:
    """A Llama of one layer, all of whose weights are nought."""
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
