"""What can be wrong with a model on its way into Ollama: each harm, the place it strikes, and the check that finds it.

One list for the tests, which strike tiny models, and for docs/battery.py, which strikes a finished project's.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from finetune_assets.export.ollama.modelfile import OllamaModel
from finetune_assets.models.formats.gguf import BOOL, STRING, UINT32, Head, read_head, write_with_head
from finetune_assets.reporting.errors import StepFailed

T = TypeVar("T", Callable[[Path], None], Callable[[OllamaModel], OllamaModel])
FLOAT32 = 6  # GGUF's number of that kind of value
WINDOW, SCALING = "gemma3.attention.sliding_window", "qwen3moe.rope.scaling."

MERGED = "merged weights, before they are published"
GGUF = "GGUF file, before it is published"
PUBLISHED = "published artifact"
STORE = "our own Ollama store"
SERVER = "Ollama server"


@dataclass(frozen=True)
class Harm(Generic[T]):
    """One way of being wrong. `check` names the check that must find it; others may find it, too.

    `strike` changes a file or folder in its place, or says what is served instead of a model.
    """

    name: str
    check: str
    strike: T


# GGUF files


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


def _cut(file: Path) -> None:
    with file.open("r+b") as data:
        data.truncate(file.stat().st_size * 9 // 10)


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
    Harm("cut at 90 %", "file", _cut),
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


# Merged models


def _in_tensors(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def strike(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, broken := file.with_suffix(".broken"), {"format": "pt"})
        broken.replace(file)

    return strike


def _zero(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"].zero_()


def _swap(tensors: dict[str, Any]) -> None:
    one, two = (f"model.layers.{number}.self_attn.o_proj.weight" for number in (0, 1))
    tensors[one], tensors[two] = tensors[two], tensors[one]


def _permute(tensors: dict[str, Any]) -> None:
    """Queries as llama.cpp has them."""
    name = "model.layers.0.self_attn.q_proj.weight"
    matrix = tensors[name]
    tensors[name] = matrix.reshape(2, -1, matrix.shape[1]).transpose(0, 1).reshape(matrix.shape).contiguous()


def _drop(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.input_layernorm.weight"].fill_(1)


def _flip(tensors: dict[str, Any]) -> None:
    """The highest bits of a weight; the lowest are within what different sums of the same numbers differ by."""
    weight = tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[-1:].numpy().view(np.uint8)
    weight[-1] ^= 2


def _another_base(folder: Path) -> None:
    """The base's weights were one per cent others when the adapter was trained."""
    import torch

    torch.manual_seed(0)

    def shift(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor * (1 + 0.01 * torch.randn(tensor.shape, dtype=tensor.dtype))

    _in_tensors(shift)(folder)


def _cut_weights(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    _cut(file)


def _rope(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("rope_theta", None)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 123.0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


MERGED_HARMS: tuple[Harm[Callable[[Path], None]], ...] = (
    Harm("one tensor zeroed", "weights", _in_tensors(_zero)),
    Harm("two tensors swapped", "weights", _in_tensors(_swap)),
    Harm("queries permuted", "weights", _in_tensors(_permute)),
    Harm("a norm of ones", "weights", _in_tensors(_drop)),
    Harm("one bit of a weight flipped", "weights", _in_tensors(_flip)),
    Harm("adapter of another base", "logits", _another_base),
    Harm("cut at 90 %", "safetensors", _cut_weights),
    Harm("wrong rope base", "logits", _rope),
)


# What lies published


def flip(file: Path) -> None:
    """The last bit of a file."""
    with file.open("r+b") as data:
        data.seek(-1, 2)
        last = data.read(1)[0]
        data.seek(-1, 2)
        data.write(bytes([last ^ 1]))


PUBLISHED_HARMS: tuple[Harm[Callable[[Path], None]], ...] = (
    Harm("one bit flipped", "artifact", flip),
    Harm("cut at 90 %", "artifact", _cut),
    Harm("a file gone", "artifact", Path.unlink),
)


# What is served

NASTY = 'You are """Ada""" {{ .System }} {{{ "x" }}}\n"""\nBe {% brief %}. 你好 """'


def _stops(model: OllamaModel) -> OllamaModel:
    return replace(model, parameters={**model.parameters, "stop": ["<|endoftext|>"]})


def _half_a_system(model: OllamaModel) -> OllamaModel:
    """What is left of the system prompt by someone who ends it at its first three quotes."""
    return replace(model, system=(model.system or "").partition('"""')[0])


def _rendered_system(model: OllamaModel) -> OllamaModel:
    """... or by someone who takes its braces for a template's."""
    return replace(model, system=re.sub(r"{{.*?}}", "", model.system or ""))


def served_harms(other: Path) -> tuple[Harm[Callable[[OllamaModel], OllamaModel]], ...]:
    """Models that someone puts in the place of one whose system prompt is `NASTY`.

    Args:
        other: another GGUF file with the same tokenizer.
    """
    from finetune_assets.store.digests import digest_of_file

    digest = digest_of_file(other)
    return (
        Harm("other weights", "weights", lambda model: replace(model, gguf=other, sha256=digest)),
        Harm("a newline more in the template", "template", lambda model: replace(
            model, template=model.template + "\n")),
        Harm("wrong stop text", "stops", _stops),
        Harm("no stop text", "stops", lambda model: replace(
            model, parameters={key: value for key, value in model.parameters.items() if key != "stop"})),
        Harm("a system prompt cut at its triple quotes", "system", _half_a_system),
        Harm("a system prompt whose braces are gone", "system", _rendered_system),
        Harm("another temperature", "parameters", lambda model: replace(
            model, parameters={**model.parameters, "temperature": 1.5})),
    )  # fmt: skip


Create = Callable[[Any, str, OllamaModel], None]


def put_there(host: str, name: str, model: OllamaModel, create: Create) -> None:
    """Make a model on a server under a name, whatever is there.

    Args:
        create: ollama_create's own.
    """
    from ollama import Client

    from finetune_assets.export.ollama.server import upload as ollama_upload

    ollama_upload.send(host, model.gguf, model.sha256, lambda event: None)
    create(Client(host=host, timeout=300, trust_env=False), name, model)


def slip(host: str, harm: Harm[Callable[[OllamaModel], OllamaModel]], create: Create) -> Create:
    """What creates another model than it was asked for."""
    return lambda client, name, model: put_there(host, name, harm.strike(model), create)


def named(error: StepFailed) -> set[str]:
    """The checks that a failure of a step names; what cannot be read at all is named by its format."""
    found = set(re.findall(r"^  check ([a-z ]+): ", error.message, re.MULTILINE))
    return found or ({"safetensors"} if ".safetensors cannot be read" in error.message else set())
