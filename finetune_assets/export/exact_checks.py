"""What must be exactly so in a GGUF file of a merged model, each under a name: structure, numbers, words, token ids."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.errors import StepFailed
from finetune_assets.export.gguf_file import Head, read_head
from finetune_assets.export.shards import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXACT = (
    "file", "tensors", "weights", "dimensions", "vocabulary", "rope base", "context length", "chat template",
    "stop tokens", "begin of text", "prompt ids",
)  # fmt: skip

# Architectures whose tensors the converter renames and stacks, but neither fuses, splits nor pads.
PLAIN = {"llama", "qwen2", "qwen3", "qwen3moe", "smollm3"}
# Of those, the ones whose queries and keys are laid out for rotation by pairs of neighbours instead of halves.
PAIRED = {"llama", "smollm3"}
# Largest relative error of a row (root mean square) that a tensor's type explains. F32 takes a bfloat16 as it is.
ROUNDING = {
    "F32": 1e-6, "F16": 0.002, "BF16": 0.005, "Q8_0": 0.02, "Q6_K": 0.05, "Q5_K": 0.1, "Q5_1": 0.1, "Q5_0": 0.1,
    "Q4_K": 0.2, "Q4_1": 0.2, "Q4_0": 0.2, "Q3_K": 0.35, "Q2_K": 0.6,
}  # fmt: skip
ROWS = 8  # of each tensor that are compared
# Tensors that a file may have although the model has none: made of the configuration.
COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# GGUF key, behind the architecture's name -> key of config.json
DIMENSIONS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
ROPE_BASE = 10000.0  # llama.cpp's, where a file names none
STOPS = ("eos", "eot", "eom")


@dataclass(frozen=True)
class Failure:
    """A check that a file did not pass, in words: what was found, and what would have been right."""

    check: str
    measured: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.check}: {self.measured}, allowed: {self.allowed}"


def check_file(gguf: Path) -> tuple[Head | None, list[Failure]]:
    """The file's head, if the file is whole as far as its tensor table goes (check `file`)."""
    try:
        return read_head(gguf), []
    except (StepFailed, OSError, ValueError) as error:
        message = error.message if isinstance(error, StepFailed) else str(error)
        return None, [Failure("file", message, "a whole GGUF file")]


def check_head(
    head: Head, gguf: Path, merged: Path, settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> list[Failure]:
    """Everything that a file says of itself, and some of its weights, against the merged folder it was made of.

    Args:
        merged: Hugging Face folder.
        settings: its chat.json.
        tokenizer: its tokenizer.
    """
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    return [
        *_tensors(head, merged, config),
        *_weights(head, gguf, merged),
        *_numbers(head, config),
        *_words(head, settings, eos if isinstance(eos := tokenizer.eos_token_id, int) else None),
    ]


def check_prompt(ours: Sequence[int], theirs: Sequence[int], read: int | None, bos: int | None) -> list[Failure]:
    """Begin-of-text tokens at the start of a prompt, then all of its ids.

    Args:
        ours: the Hugging Face tokenizer's, of the prompt that training's template renders.
        theirs: llama.cpp's, of the prompt that the file's template renders.
        read: how many tokens a chat completion of the same messages read, where that was tried.
    """
    failures: list[Failure] = []
    if bos is not None and (found := _leading(theirs, bos)) != (wanted := _leading(ours, bos)):
        failures.append(Failure("begin of text", f"{found} begin-of-text tokens before a prompt", str(wanted)))
    if list(ours) != list(theirs):
        at = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        at = min(len(ours), len(theirs)) if at is None else at
        found = f"{len(theirs)} ids of a prompt, from place {at} on {list(theirs[at : at + 4])}"
        failures.append(Failure("prompt ids", found, f"{len(ours)} ids, {list(ours[at : at + 4])} there"))
    elif read is not None and read != len(ours):
        failures.append(Failure("prompt ids", f"{read} tokens read by a chat completion", str(len(ours))))
    return failures


def _leading(ids: Sequence[int], token: int) -> int:
    return next((at for at, found in enumerate(ids) if found != token), len(ids))


def _weights(head: Head, gguf: Path, merged: Path) -> Iterator[Failure]:
    """Rows of every tensor that has a name of its own beside the merged model's: coarse types hide much in their KL."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    architecture = str(head.get("general.architecture"))
    if architecture not in PLAIN:
        return
    names, data = _names(head), np.memmap(gguf, dtype=np.uint8, mode="r")
    held = {tensor.name: tensor for tensor in head.tensors}
    worst: tuple[float, Failure] | None = None
    with Checkpoint(merged) as checkpoint:
        for ours in checkpoint:
            spec = checkpoint.spec(ours)
            tensor = held.get(names.get_name(ours, try_suffixes=(".weight", ".bias")) or "")
            if tensor is None or tensor.shape != spec.shape[::-1]:
                continue  # stacked, or a finding of another check
            count = spec.shape[0] if len(spec.shape) > 1 else 1
            at = place = sorted({number * count // ROWS for number in range(ROWS)})
            if architecture in PAIRED and (part := tensor.name.split(".")[-2]) in ("attn_q", "attn_k"):
                heads = head.get(f"{architecture}.attention.{'head_count' if part == 'attn_q' else 'head_count_kv'}")
                if not isinstance(heads, int) or count % (2 * heads):
                    continue  # a bias, or a head count that another check finds wrong
                half = count // heads // 2
                place = [row - row % (2 * half) + row % half * 2 + row // half % 2 for row in at]
            begin = head.data_start + tensor.offset
            rows = data[begin : begin + tensor.nbytes].reshape(count, -1)[place]
            found = dequantize(rows, GGMLQuantizationType(tensor.type_number)).reshape(-1).astype(np.float64)
            wanted = checkpoint.rows(ours, at).double().numpy().reshape(-1)
            error = float(np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1e-30))
            allowed = ROUNDING[tensor.type]
            if not error <= allowed and (worst is None or not error / allowed <= worst[0]):
                shown = Failure("weights", f"{tensor.name} ({tensor.type}) off by {error:.2%}", f"{allowed:.4%}")
                worst = (error / allowed, shown)
    if worst is not None:
        yield worst[1]


def _names(head: Head) -> Any:
    """From a Hugging Face tensor's name to GGUF's, for the architecture and its number of layers."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = str(head.get("general.architecture"))
    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    return get_tensor_name_map(numbers[architecture], int(head.get(f"{architecture}.block_count", 0)))


def _tensors(head: Head, merged: Path, config: Mapping[str, Any]) -> Iterator[Failure]:
    """All weights are there, in their shapes; of other architectures than `PLAIN` only what has a plain name."""
    from gguf import MODEL_ARCH_NAMES

    architecture = str(head.get("general.architecture"))
    if architecture not in MODEL_ARCH_NAMES.values():
        yield Failure("tensors", f"the architecture {architecture!r}", "one that llama.cpp has")
        return
    names = _names(head)
    held = {tensor.name: tensor for tensor in head.tensors}
    rest = {name: tensor.elements for name, tensor in held.items() if name not in COMPUTED}
    unnamed = 0
    with Checkpoint(merged) as checkpoint:
        specs = [checkpoint.spec(name) for name in checkpoint]
    for spec in specs:
        name = names.get_name(spec.name, try_suffixes=(".weight", ".bias"))
        if name == "output.weight" and name not in held and config.get("tie_word_embeddings"):
            continue  # the embeddings serve as one
        if name is None:
            unnamed += math.prod(spec.shape)
        elif name not in held:
            if architecture in PLAIN:
                yield Failure("tensors", f"no {name}", f"the model's {spec.name}")
        else:
            rest.pop(name, None)
            shape = held[name].shape
            if architecture in PLAIN and shape != spec.shape[::-1]:
                yield Failure("tensors", f"{name} of shape {shape}", f"{spec.shape[::-1]}, as {spec.name} has")
    # What has no name of its own, such as the experts, is stacked into fewer tensors: their weights must add up.
    if architecture in PLAIN and sum(rest.values()) != unnamed:
        found = ", ".join([*rest][:4]) or "nothing"
        yield Failure("tensors", f"{sum(rest.values())} weights in {found}", f"{unnamed} in tensors beside the named")


def _numbers(head: Head, config: Mapping[str, Any]) -> Iterator[Failure]:
    architecture = str(head.get("general.architecture"))
    if architecture in PLAIN:
        for key, ours in DIMENSIONS.items():
            found, wanted = head.get(f"{architecture}.{key}"), config.get(ours)
            if wanted is not None and not isinstance(found, list) and not _same(found, wanted):
                yield Failure("dimensions", f"{key} {found}", f"{wanted}, as {ours} says")
    tokens = len(head.get("tokenizer.ggml.tokens", []))
    rows = next((tensor.shape[-1] for tensor in head.tensors if tensor.name == "token_embd.weight"), None)
    if rows is not None and tokens != rows:
        yield Failure("vocabulary", f"{tokens} tokens", f"{rows}, one for each row of the embeddings")
    if architecture in PLAIN and (wanted := config.get("vocab_size")) not in (None, tokens):
        yield Failure("vocabulary", f"{tokens} tokens", f"{wanted}, as vocab_size says")
    wanted = _rope_base(config)
    found = head.get(f"{architecture}.rope.freq_base", ROPE_BASE)
    if wanted is not None and not _same(found, wanted):
        yield Failure("rope base", f"{found:g}", f"{wanted:g}")
    wanted, found = config.get("max_position_embeddings"), head.get(f"{architecture}.context_length")
    if wanted is not None and found != wanted:
        yield Failure("context length", str(found), str(wanted))


def _rope_base(config: Mapping[str, Any]) -> float | None:
    """The configuration's, in its new and its old spelling; that of full attention where layers differ."""
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    return rope.get("rope_theta", config.get("rope_theta"))


def _same(found: Any, wanted: Any) -> bool:
    """Equal numbers, as far as float32 tells them apart."""
    return found is not None and math.isclose(found, wanted, rel_tol=1e-6)


def _words(head: Head, settings: Mapping[str, Any], eos: int | None) -> Iterator[Failure]:
    found, wanted = head.get("tokenizer.chat_template"), settings["template"]
    if found != wanted:
        yield Failure("chat template", _difference(found, wanted), "the text that the model was trained with")
    ends = {name: head.get(f"tokenizer.ggml.{name}_token_id") for name in STOPS}
    if eos is not None and ends["eos"] != eos:
        yield Failure("stop tokens", f"eos {ends['eos']}", f"{eos}, the tokenizer's")
    if missing := [token for token in settings["stop_token_ids"] if token not in ends.values()]:
        shown = ", ".join(f"{name} {token}" for name, token in ends.items() if token is not None) or "none"
        yield Failure("stop tokens", shown, f"{missing[0]} among them, which ends an answer")


def _difference(found: str | None, wanted: str) -> str:
    if found is None:
        return "none"
    at = next((at for at, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), None)
    at = min(len(found), len(wanted)) if at is None else at
    return f"another one from character {at} on ({found[at : at + 20]!r} for {wanted[at : at + 20]!r})"
