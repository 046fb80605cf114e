"""The form of the GGUF files that we write: `llama-quantize IN OUT COPY` of llama.cpp does not change it.

Ollama 0.31.2 and later copy every GGUF file that way when they create a model. A file of another form gets another
digest there. Read in llama.cpp b10605 (src/llama-quant.cpp, src/llama-model-loader.h, ggml/src/gguf.cpp):

- version 3; the metadata in their order, then general.quantization_version and general.file_type; no split.*
- tensors sorted by layer, then by name; no trailing dimensions of 1
- data aligned to 32 bytes, zeros between, whatever general.alignment says: the key is left out
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from finetune_assets.models.formats.gguf import ARRAY, STRING, TYPE_NAMES, UINT32, Head, Tensor, read_head
from finetune_assets.reporting.errors import StepFailed

GGML_QUANTISATION_VERSION = 2
FILE_TYPE = "general.file_type"
LAST: Mapping[str, tuple[int, bytes]] = {
    "general.quantization_version": (UINT32, struct.pack("<I", GGML_QUANTISATION_VERSION))
}
LEFT_OUT = ("general.alignment", "split.no", "split.count", "split.tensors.count")
BLOCK = 1 << 24  # bytes copied at a time


def in_form(head: Head) -> Head:
    """Return the same content in this form, with tensors laid out one after the other."""
    return replace(head, version=3, raw=metadata_in_form(head.raw)).laid_out(in_order(head.tensors))


def metadata_in_form(raw: Mapping[str, tuple[int, bytes]]) -> dict[str, tuple[int, bytes]]:
    """Return the metadata of a file of this form."""
    rest = {key: value for key, value in raw.items() if key not in (*LEFT_OUT, *LAST, FILE_TYPE)}
    return {**rest, **LAST, **({FILE_TYPE: raw[FILE_TYPE]} if FILE_TYPE in raw else {})}


def in_order(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the tensors sorted, at their old offsets, without trailing dimensions of 1."""
    return tuple(replace(tensor, shape=short(tensor.shape)) for tensor in sorted(tensors, key=place_of))


def place_of(tensor: Tensor) -> tuple[int, str]:
    """Return the sort key of a tensor: llama.cpp sorts by layer, then by name."""
    return place(tensor.name)


def place(name: str) -> tuple[int, str]:
    """Return the sort key of a tensor's name."""
    return layer_of(name), name


def layer_of(name: str) -> int:
    """Return the number in a tensor's name, blk.NUMBER; -1 outside the layers."""
    layer = re.match(r"blk\.(\d+)", name)
    return int(layer[1]) if layer else -1


def short(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without its trailing dimensions of 1."""
    size = len(shape)
    while size > 1 and shape[size - 1] == 1:
        size -= 1
    return shape[:size]


def is_in_form(head: Head) -> bool:
    """Return whether a file with this head is in this form, as far as the head shows."""
    if any(tensor.type_number not in TYPE_NAMES for tensor in head.tensors):  # of unknown size
        return in_order(head.tensors) == head.tensors and list(metadata_in_form(head.raw)) == list(head.raw)
    made = in_form(head)
    return (made.version, list(made.raw.items()), made.tensors) == (head.version, list(head.raw.items()), head.tensors)


def write_in_form(source: Path, head: Head, target: Path) -> None:
    """Write the weights of `source` in this form behind `head`, which names the same tensors; memory is one block.

    Raises:
        StepFailed: a tensor has a type of unknown size.
    """
    made = in_form(head)
    found = read_head(source)
    places = {tensor.name: found.data_start + tensor.offset for tensor in found.tensors}
    encoded = made.encode()
    with source.open("rb") as data, target.open("wb") as out:
        out.write(encoded)
        for tensor in made.tensors:
            data.seek(places[tensor.name])
            out.seek(len(encoded) + tensor.offset)
            left = tensor.nbytes
            while left:
                if not (block := data.read(min(left, BLOCK))):
                    raise StepFailed(f"{source} ends within tensor {tensor.name}", "make it again")
                out.write(block)
                left -= len(block)
        out.truncate(len(encoded) + made.data_size)  # bytes between and behind tensors are zero


def cut_texts(head: Head) -> Head:
    """Return the head with each text cut before its first NUL character: llama.cpp reads and copies no further."""
    return replace(head, raw={key: (kind, _cut(kind, data)) for key, (kind, data) in head.raw.items()})


def _cut(kind: int, data: bytes) -> bytes:
    if kind == STRING:
        return _string(data, 0)[0]
    if kind != ARRAY or struct.unpack_from("<I", data)[0] != STRING:
        return data
    parts, at = [data[:12]], 12
    while at < len(data):
        text, at = _string(data, at)
        parts.append(text)
    return b"".join(parts)


def _string(data: bytes, at: int) -> tuple[bytes, int]:
    """Return the text at an offset, cut, and the offset behind it."""
    end = at + 8 + struct.unpack_from("<Q", data, at)[0]
    text = data[at + 8 : end].partition(b"\0")[0]
    return struct.pack("<Q", len(text)) + text, end
