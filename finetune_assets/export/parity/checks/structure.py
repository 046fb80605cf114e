"""Checks of a GGUF file that are exact: its structure, dimensions, chat template and stop tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.export.gguf.form import short
from finetune_assets.export.parity.checks.architecture import EXPERT, PLAIN, TEXT_PART, architecture, renamed
from finetune_assets.export.parity.checks.failure import Failure
from finetune_assets.models.formats.gguf import Head, read_head
from finetune_assets.models.formats.safetensors import Checkpoint
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.reporting.first_difference import first_difference
from finetune_assets.store.digests import digest_of_file

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

EXACT = (
    "bytes", "file", "tensors", "weights", "dimensions", "vocabulary", "rope base", "rope scaling", "context length",
    "chat template", "stop tokens", "begin of text", "prompt ids",
)  # fmt: skip

# Tensors that a file may have although the model has none: made of the configuration.
COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# GGUF key, behind the architecture's name -> key of the configuration
DIMENSIONS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "expert_used_count": "num_experts_per_tok",
}
ONLY_OF = {"attention.sliding_window": "gemma3"}  # the others read all of a text in llama.cpp
STOPS = ("eos", "eot", "eom")
ORDINARY = 1  # kind of a token that is a piece of text


def check_file(gguf: Path, sha256: str | None = None) -> tuple[Head | None, list[Failure]]:
    """Return the file's head if its tensor table can be read (check `file`), and the failed checks.

    Args:
        sha256: hex; a file of another content fails the check `bytes`.
    """
    failures: list[Failure] = []
    try:
        if sha256 is not None and (found := digest_of_file(gguf)) != sha256:
            failures.append(Failure("bytes", f"sha256 {found[:12]}", f"{sha256[:12]}, as it was written"))
        return read_head(gguf), failures
    except (StepFailed, OSError, ValueError) as error:
        message = error.message if isinstance(error, StepFailed) else str(error)
        return None, [*failures, Failure("file", message, "a whole GGUF file")]


def check_head(
    head: Head,
    merged: Path,
    config: PreTrainedConfig,
    settings: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Failure]:
    """Compare tensors, dimensions, template and stop tokens of a file with the model that it was made from.

    Args:
        merged: Hugging Face folder.
        config: of the merged model, or of the part of it that reads text.
        settings: its chat.json.
        tokenizer: its tokenizer.
    """
    plain = [*_tensors(head, merged, config), *_dimensions(head, config)] if architecture(head) in PLAIN else []
    eos = tokenizer.eos_token_id
    return [*plain, *_words(head, settings, eos if isinstance(eos, int) else None)]


def _tensors(head: Head, merged: Path, config: PreTrainedConfig) -> Iterator[Failure]:
    """Compare the names and shapes of all weights."""
    name_of = renamed(head)
    held = {tensor.name: tensor for tensor in head.tensors}
    experts: Counter[str] = Counter()
    shapes: dict[str, tuple[int, ...]] = {}  # wanted, ggml's way round
    unnamed = 0
    with Checkpoint(merged) as checkpoint:
        of_text = [name for name in checkpoint if TEXT_PART in name or name.startswith("lm_head.")]
        others = any(TEXT_PART in name for name in of_text)  # that see or hear, and stay out of the file
        specs = [checkpoint.spec(name) for name in (of_text if others else checkpoint)]
    for spec in specs:
        name = name_of(spec.name)
        if name == "output.weight" and name not in held and config.tie_word_embeddings:
            continue  # the embeddings serve as one
        if name is None:
            unnamed += math.prod(spec.shape)
            continue
        shapes[name] = spec.shape[::-1]
        if EXPERT.search(spec.name):
            experts[name] += 1
            shapes[name] += (experts[name],)
    for name, wanted in shapes.items():
        if name not in held:
            yield Failure("tensors", f"no {name}", "all that the model has")
        elif short(held[name].shape) != short(wanted):
            yield Failure("tensors", f"{name} of shape {held[name].shape}", f"{wanted}, as the model's")
    rest = {name: tensor.elements for name, tensor in held.items() if name not in shapes and name not in COMPUTED}
    # What has no name of its own, such as experts fused into one tensor, is cut up anew: the weights must add up.
    if rest and sum(rest.values()) != unnamed:
        found = ", ".join([*rest][:4])
        yield Failure("tensors", f"{sum(rest.values())} weights in {found}", f"{unnamed} in unnamed tensors")


def _dimensions(head: Head, config: PreTrainedConfig) -> Iterator[Failure]:
    for key, ours in DIMENSIONS.items():
        found, wanted = head.get(f"{architecture(head)}.{key}"), getattr(config, ours, None)
        if wanted is None or architecture(head) != ONLY_OF.get(key, architecture(head)):
            continue
        if not isinstance(found, list) and not same(found, wanted):
            yield Failure("dimensions", f"{key} {found}", f"{wanted}, as {ours} says")


def same(found: Any, wanted: float) -> bool:
    """Return whether two numbers are equal within the precision of float32."""
    return isinstance(found, (int, float)) and math.isclose(found, wanted, rel_tol=1e-6)


def _words(head: Head, settings: Mapping[str, Any], eos: int | None) -> Iterator[Failure]:
    found, wanted = head.get("tokenizer.chat_template"), settings["template"]
    if found != wanted:
        yield Failure("chat template", _difference(found, wanted), "the text that the model was trained with")
    ends = {name: head.get(f"tokenizer.ggml.{name}_token_id") for name in STOPS}
    if eos is not None and ends["eos"] != eos:
        yield Failure("stop tokens", f"eos {ends['eos']}", f"{eos}, the tokenizer's")
    kinds = head.get("tokenizer.ggml.token_type", [])
    for name, token in ends.items():
        if token is None or token in (eos, *settings["stop_token_ids"]):
            continue
        if token < len(kinds) and kinds[token] == ORDINARY:
            yield Failure("stop tokens", f"{name} {token}, an ordinary word", "no words, which would end an answer")
    if missing := [token for token in settings["stop_token_ids"] if token not in ends.values()]:
        shown = ", ".join(f"{name} {token}" for name, token in ends.items() if token is not None) or "none"
        yield Failure("stop tokens", shown, f"{missing[0]} among them, which ends an answer")


def _difference(found: str | None, wanted: str) -> str:
    if found is None:
        return "none"
    at = first_difference(found, wanted)
    return f"different from character {at} on ({found[at : at + 20]!r} for {wanted[at : at + 20]!r})"
