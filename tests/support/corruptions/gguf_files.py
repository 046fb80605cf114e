"""Harms of GGUF files."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from finetune_assets.models.formats.gguf import BOOL, STRING, UINT32, Head, read_head, write_with_head
from tests.support.corruptions.files import cut
from tests.support.corruptions.harm import Harm

FLOAT32 = 6  # GGUF's number of that kind of value
WINDOW, SCALING = "gemma3.attention.sliding_window", "qwen3moe.rope.scaling."


def _in_rows(change: Callable[[Head, dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    """A change of weights: each tensor's rows as bytes, writable into the file."""

    def strike(file: Path) -> None:
        head, data = read_head(file), np.memmap(file, dtype=np.uint8, mode="r+")
        rows = {
            tensor.name: data[head.data_start + tensor.offset :][: tensor.nbytes].reshape(tensor.rows, -1)
            for tensor in head.tensors
        }
        change(head, rows)
        data.flush()

    return strike


def _in_head(change: Callable[[Head], Head]) -> Callable[[Path], None]:
    def strike(file: Path) -> None:
        head = read_head(file)
        changed = change(head)
        assert changed != head
        write_with_head(file, changed, broken := file.with_suffix(".broken"))
        broken.replace(file)

    return strike


def _another_layer(head: Head, rows: dict[str, np.ndarray]) -> None:
    """A layer in the place of the next: only its like can stand there."""
    for name in [name for name in rows if name.startswith("blk.0.")]:
        one, two = rows[name], rows[name.replace("blk.0.", "blk.1.")]
        if one.shape == two.shape:  # a mixture may give the two other types
            one[:], two[:] = two.copy(), one.copy()


def _last_layer(head: Head) -> str:
    return f"blk.{head.get(head.get('general.architecture') + '.block_count') - 1}"


def _zeroed(head: Head, rows: dict[str, np.ndarray]) -> None:
    rows[f"{_last_layer(head)}.ffn_down.weight"][:] = 0


def _swapped(head: Head, rows: dict[str, np.ndarray]) -> None:
    one, two = rows["blk.0.attn_q.weight"], rows["blk.0.attn_output.weight"]
    one[:], two[:] = two.copy(), one.copy()


def _as_in_hugging_face(head: Head, rows: dict[str, np.ndarray]) -> None:
    """Queries and keys unpermuted: halves of a head's rotation one after the other, not in turn."""
    for name, key in (("attn_q", "head_count"), ("attn_k", "head_count_kv")):
        matrix, heads = rows[f"blk.0.{name}.weight"], head.get(f"llama.attention.{key}")
        split = matrix.reshape(heads, len(matrix) // heads // 2, 2, -1)
        matrix[:] = split.swapaxes(1, 2).reshape(matrix.shape).copy()


def _ones(head: Head, rows: dict[str, np.ndarray]) -> None:
    rows[f"{_last_layer(head)}.attn_norm.weight"].view(np.float32)[:] = 1


def _louder(head: Head, rows: dict[str, np.ndarray]) -> None:
    norm = rows[f"{_last_layer(head)}.attn_norm.weight"].view(np.float32)
    norm *= 3


def _one_bit(head: Head, rows: dict[str, np.ndarray]) -> None:
    """The least of a weight's bits, in a row that no prompt uses."""
    rows["token_embd.weight"][-1, -1] ^= 1


def _nearer(head: Head, rows: dict[str, np.ndarray]) -> None:
    """Long waves a hundredth shorter."""
    rows["rope_freqs.weight"].view(np.float32)[0, -1] *= 0.99


def _flipped_merge(file: Path) -> None:
    """A byte among the tokenizer's words."""
    with file.open("r+b") as data:
        start = data.read(read_head(file).data_start)
        at = start.index(b"tokenizer.ggml.tokens") + 2000
        data.seek(at)
        data.write(bytes([start[at] ^ 1]))


def _without_norm(head: Head) -> Head:
    return _without_tensor(f"{_last_layer(head)}.attn_norm.weight")(head)


def _without_tensor(name: str) -> Callable[[Head], Head]:
    return lambda head: replace(head, tensors=tuple(tensor for tensor in head.tensors if tensor.name != name))


def _without(key: str) -> Callable[[Head], Head]:
    return lambda head: replace(head, raw={name: value for name, value in head.raw.items() if name != key})


def _template(change: Callable[[str], str]) -> Callable[[Head], Head]:
    key = "tokenizer.chat_template"
    return lambda head: head.with_value(key, STRING, change(head.get(key)))


def _doubled(value: float) -> float:
    return value * 2


def _float(key: str, change: Callable[[float], float]) -> Callable[[Head], Head]:
    def changed(head: Head) -> Head:
        value = struct.pack("<f", change(head.get(key)))
        return replace(head, raw=head.raw | {key: (FLOAT32, value)})

    return changed


def _end(head: Head) -> Head:
    key = "tokenizer.ggml.eos_token_id"
    return head.with_value(key, UINT32, head.get(key) + 1 if head.get(key) == 0 else 0)


def _words(change: Callable[[list[str]], list[str]], key: str = "tokenizer.ggml.tokens") -> Callable[[Head], Head]:
    def changed(head: Head) -> Head:
        words = [word.encode() for word in change(head.get(key))]
        data = b"".join(struct.pack("<Q", len(word)) + word for word in words)
        return replace(head, raw=head.raw | {key: (head.raw[key][0], struct.pack("<IQ", STRING, len(words)) + data)})

    return changed


def _of_kind(number: int, *, token: int) -> Callable[[Head], Head]:
    def changed(head: Head) -> Head:
        kind, data = head.raw["tokenizer.ggml.token_type"]
        at = 12 + 4 * token
        value = data[:at] + struct.pack("<i", number) + data[at + 4 :]
        return replace(head, raw=head.raw | {"tokenizer.ggml.token_type": (kind, value)})

    return changed


def _swapped_words(words: list[str]) -> list[str]:
    return [*words[:300], words[301], words[300], *words[302:]]


def _scaled(head: Head) -> Head:
    """Places a twentieth closer to each other than they are."""
    return replace(head, raw=head.raw | {"llama.rope.scaling.factor": (FLOAT32, struct.pack("<f", 1.05))})


def _padded(words: list[str]) -> list[str]:
    return [f"[PAD{number}]" if word == "<|im_end|>" else word for number, word in enumerate(words)]


GGUF_HARMS: tuple[Harm[Callable[[Path], None]], ...] = (
    Harm("one tensor zeroed", "weights", _in_rows(_zeroed)),
    Harm("two tensors swapped", "weights", _in_rows(_swapped)),
    Harm("two layers swapped", "weights", _in_rows(_another_layer)),
    Harm("queries and keys not permuted", "weights", _in_rows(_as_in_hugging_face)),
    Harm("a norm dropped", "tensors", _in_head(_without_norm)),
    Harm("a norm of ones", "weights", _in_rows(_ones)),
    Harm("a norm three times as large", "weights", _in_rows(_louder)),
    Harm("one bit of a weight flipped", "bytes", _in_rows(_one_bit)),
    Harm("one bit of the vocabulary flipped", "bytes", _flipped_merge),
    Harm("cut at 90 %", "file", cut),
    Harm("a newline more in the template", "chat template", _in_head(_template(lambda text: text + "\n"))),
    Harm(
        "a newline more after the answer's header", "prompt ids",
        _in_head(_template(lambda text: text.replace("assistant\n'", "assistant\n\n'").replace(
            "assistant\\n'", "assistant\\n\\n'"))),
    ),
    Harm("no template", "chat template", _in_head(_without("tokenizer.chat_template"))),
    Harm("wrong end-of-text token", "stop tokens", _in_head(_end)),
    Harm(
        "a word that ends a turn", "stop tokens",
        _in_head(lambda head: head.with_value("tokenizer.ggml.eot_token_id", UINT32, 300)),
    ),
    Harm("an added token missing", "vocabulary", _in_head(_words(_padded))),
    Harm("an added token as an ordinary word", "vocabulary", _in_head(_of_kind(1, token=2))),
    Harm("one token too few", "vocabulary", _in_head(_words(lambda words: words[:-1]))),
    Harm("wrong rope base", "rope base", _in_head(_float("llama.rope.freq_base", _doubled))),
    Harm("no rope base", "rope base", _in_head(_without("llama.rope.freq_base"))),
    Harm("a rope scaling that the model has not", "rope scaling", _in_head(_scaled)),
    Harm(
        "a shorter context", "context length",
        _in_head(lambda head: head.with_value("llama.context_length", UINT32, 256)),
    ),
    Harm(
        "another epsilon", "dimensions",
        _in_head(_float("llama.attention.layer_norm_rms_epsilon", lambda epsilon: 0.5)),
    ),
)  # fmt: skip
# Of files with a byte-level tokenizer, whose words the converter takes as they are.
WORD_HARMS: tuple[Harm[Callable[[Path], None]], ...] = (
    Harm("two words swapped", "vocabulary", _in_head(_words(_swapped_words))),
    Harm("a word as a control token", "vocabulary", _in_head(_of_kind(3, token=300))),
    Harm("the last merge missing", "vocabulary", _in_head(_words(lambda pairs: pairs[:-1], "tokenizer.ggml.merges"))),
)
# Of files of other shapes. What they do shows in long conversations, or in words that none of the held-out rows has.
LLAMA_3_HARMS: tuple[Harm[Callable[[Path], None]], ...] = (
    Harm("another factor for a frequency", "rope scaling", _in_rows(_nearer)),
    Harm("all frequencies as they were", "rope scaling", _in_head(_without_tensor("rope_freqs.weight"))),
)
GEMMA_HARMS: tuple[Harm[Callable[[Path], None]], ...] = (
    Harm("another base for sliding attention", "rope base", _in_head(_float("gemma3.rope.freq_base_swa", _doubled))),
    Harm("another window", "dimensions", _in_head(lambda head: head.with_value(WINDOW, UINT32, 4096))),
    Harm("no window", "dimensions", _in_head(_without(WINDOW))),
    Harm("no rope scaling", "rope scaling", _in_head(_without("gemma3.rope.scaling.factor"))),
)
YARN_HARMS: tuple[Harm[Callable[[Path], None]], ...] = (
    Harm("linear for yarn", "rope scaling", _in_head(lambda head: head.with_value(SCALING + "type", STRING, "linear"))),
    Harm("yarn by another factor", "rope scaling", _in_head(_float(SCALING + "factor", _doubled))),
    Harm("yarn from another length", "rope scaling", _in_head(
        lambda head: head.with_value(SCALING + "original_context_length", UINT32, 512))),
    Harm("one expert too many", "dimensions", _in_head(
        lambda head: head.with_value("qwen3moe.expert_used_count", UINT32, 3))),
)  # fmt: skip
# llama.cpp leaves it out again where a template begins with it, as the demo's does.
BEGIN_OF_TEXT = Harm(
    "begin-of-text added", "begin of text",
    _in_head(lambda head: head.with_value("tokenizer.ggml.add_bos_token", BOOL, True)),
)  # fmt: skip
# Weights so wrong that the distributions of a coarse type show it, too; a limit for its KL must be below what they do.
LOUD_HARMS = tuple(harm for harm in GGUF_HARMS if harm.check == "weights" and harm.name != "a norm of ones")
