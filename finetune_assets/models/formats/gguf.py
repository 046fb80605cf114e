"""The head of a GGUF file: metadata and tensor table, without a third-party import and without reading the weights.

Metadata values stay raw bytes until they are read, so that a file can be written again with all of its metadata,
including unknown kinds. Versions 2 and 3, little-endian. Specification:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from finetune_assets.reporting.errors import StepFailed

MAGIC = b"GGUF"
UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


class TensorType(NamedTuple):
    """How ggml stores the weights of a tensor: in blocks, one after the other.

    Attributes:
        number: ggml's (enum ggml_type).
        block: weights in a block.
        size: bytes of a block.
        scales: where the float16 scales (and minima) begin in a block, in bytes; llama.cpp checks the same ones.
    """

    number: int
    block: int
    size: int
    scales: tuple[int, ...] = ()


TENSOR_TYPES = {
    "F32": TensorType(0, 1, 4),
    "F16": TensorType(1, 1, 2, scales=(0,)),
    "BF16": TensorType(30, 1, 2),
    "Q8_0": TensorType(8, 32, 34, scales=(0,)),
    "Q4_0": TensorType(2, 32, 18, scales=(0,)),
    "Q4_1": TensorType(3, 32, 20, scales=(0, 2)),
    "Q5_0": TensorType(6, 32, 22, scales=(0,)),
    "Q5_1": TensorType(7, 32, 24, scales=(0, 2)),
    "Q2_K": TensorType(10, 256, 84, scales=(80, 82)),
    "Q3_K": TensorType(11, 256, 110, scales=(108,)),
    "Q4_K": TensorType(12, 256, 144, scales=(0, 2)),
    "Q5_K": TensorType(13, 256, 176, scales=(0, 2)),
    "Q6_K": TensorType(14, 256, 210, scales=(208,)),
}
TYPE_NAMES = {row.number: name for name, row in TENSOR_TYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """A row of the tensor table.

    `shape` is ggml's: the row length comes first. `offset` is in bytes from the data's start.
    """

    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        return self.elements // self.shape[0]

    @property
    def matrices(self) -> int:
        """Number of experts in one tensor; 1 for a plain matrix."""
        return self.shape[2] if len(self.shape) > 2 else 1

    @property
    def row_size(self) -> int:
        return self.nbytes // self.rows

    @property
    def type(self) -> str:
        """The type's name; StepFailed for a type that is not supported."""
        if self.type_number not in TYPE_NAMES:
            raise StepFailed(
                f"tensor {self.name} has GGML type {self.type_number}, which is not among {list(TENSOR_TYPES)}"
            )
        return TYPE_NAMES[self.type_number]

    @property
    def nbytes(self) -> int:
        stored = TENSOR_TYPES[self.type]
        return self.elements // stored.block * stored.size

    @property
    def is_quantised(self) -> bool:
        """Whether weights share a scale with others of their block."""
        return TENSOR_TYPES[self.type].block > 1


@dataclass(frozen=True)
class Head:
    """Everything before the weights. `raw` maps a key to its value's type number and bytes."""

    version: int
    raw: dict[str, tuple[int, bytes]]
    tensors: tuple[Tensor, ...]
    data_start: int

    @property
    def alignment(self) -> int:
        return self.get("general.alignment", 32)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(tensor.elements for tensor in self.tensors)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a metadata value, decoded; arrays become lists. Bytes that are not UTF-8 are shown as \\xNN."""
        if key not in self.raw:
            return default
        kind, data = self.raw[key]
        return _Cursor(data, 0).value(kind)

    @property
    def data_size(self) -> int:
        """Bytes of the weights, where tensors lie one after the other; readers expect the last one padded as well."""
        ends = (tensor.offset + tensor.nbytes for tensor in self.tensors)
        return _aligned(max(ends, default=0), self.alignment)

    def with_value(self, key: str, kind: int, value: int | bool | str) -> Head:
        """Return the same head with one value set (`kind` UINT32, BOOL or STRING), in its place or at the end."""
        data = _string(value) if isinstance(value, str) else struct.pack(SCALARS[kind], value)
        return replace(self, raw=self.raw | {key: (kind, data)})

    def with_tensors(self, types: list[str]) -> Head:
        """Return the same head for a file in which the tensors have these types, laid out one after the other."""
        named = zip(self.tensors, types, strict=True)
        return self.laid_out([replace(tensor, type_number=TENSOR_TYPES[name].number) for tensor, name in named])

    def laid_out(self, tensors: Sequence[Tensor]) -> Head:
        """Return the same head for a file of these tensors, one after the other."""
        made: list[Tensor] = []
        at = 0
        for tensor in tensors:
            made.append(replace(tensor, offset=at))
            at = _aligned(at + tensor.nbytes, self.alignment)
        return replace(self, tensors=tuple(made))

    def encode(self) -> bytes:
        """Return the head as bytes, padded to where the data begin."""
        parts = [MAGIC, struct.pack("<IQQ", self.version, len(self.tensors), len(self.raw))]
        for key, (kind, data) in self.raw.items():
            parts += [_string(key), struct.pack("<I", kind), data]
        for tensor in self.tensors:
            dimensions = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
            parts += [_string(tensor.name), dimensions, struct.pack("<IQ", tensor.type_number, tensor.offset)]
        head = b"".join(parts)
        return head + bytes(_aligned(len(head), self.alignment) - len(head))


def read_head(path: Path) -> Head:
    """Read the head of a GGUF file.

    Raises:
        StepFailed: it is not a GGUF file, is cut short, or has an unsupported version.
    """
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8 or start[:4] != MAGIC:
            raise StepFailed(f"{path} is not a GGUF file", "make it again")
        version = struct.unpack("<I", start[4:])[0]
        if version not in (2, 3):
            raise StepFailed(f"{path} is GGUF version {version} (or big-endian); versions 2 and 3 are known")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                head = _parse(data, version)
            except (struct.error, ArithmeticError, LookupError, TypeError, ValueError) as error:
                raise StepFailed(f"{path} is damaged or cut short in its head", "make it again") from error
    last = max(head.tensors, key=lambda tensor: tensor.offset, default=None)
    if last is None:  # a vocabulary alone, which ends where its head does
        return head
    needs = head.data_start + last.offset + (last.nbytes if last.type_number in TYPE_NAMES else 1)
    if path.stat().st_size < needs:
        raise StepFailed(f"{path} is cut short: {path.stat().st_size} bytes, its tensors need {needs}", "make it again")
    return head


def context_of_gguf(file: Path) -> int | None:
    """Return the longest context that a GGUF file's model was trained for, in tokens."""
    head = read_head(file)
    return head.get(f"{head.get('general.architecture')}.context_length")


def write_with_head(source: Path, head: Head, target: Path) -> None:
    """Write the weights of `source` behind another head, which names the same tensors at the same offsets."""
    with source.open("rb") as weights, target.open("wb") as out:
        weights.seek(read_head(source).data_start)
        out.write(head.encode())
        shutil.copyfileobj(weights, out, 1 << 24)


def _parse(data: mmap.mmap, version: int) -> Head:
    cursor = _Cursor(data, 8)
    n_tensors, n_values = cursor.number("<Q"), cursor.number("<Q")
    raw: dict[str, tuple[int, bytes]] = {}
    for _ in range(n_values):
        key = cursor.string()
        kind = cursor.number("<I")
        begin = cursor.at
        cursor.skip(kind)
        raw[key] = (kind, data[begin : cursor.at])
    tensors: list[Tensor] = []
    for _ in range(n_tensors):
        name = cursor.string()
        shape = tuple(cursor.number("<Q") for _ in range(cursor.number("<I")))
        if not shape or 0 in shape:
            raise ValueError(f"tensor {name} of shape {shape}")
        tensors.append(Tensor(name, shape, cursor.number("<I"), cursor.number("<Q")))
    head = Head(version, raw, tuple(tensors), 0)
    return replace(head, data_start=_aligned(cursor.at, head.alignment))


class _Cursor:
    """Reads values one after the other from bytes or a memory map."""

    def __init__(self, data: bytes | mmap.mmap, at: int):
        self.data = data
        self.at = at

    def number(self, form: str) -> Any:
        value = struct.unpack_from(form, self.data, self.at)[0]
        self.at += struct.calcsize(form)
        return value

    def string(self, errors: str = "strict") -> str:
        size = self.number("<Q")
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8", errors)

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string("backslashreplace")
        if kind == ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            return [self.value(inner) for _ in range(count)]
        return self.number(SCALARS[kind])

    def skip(self, kind: int) -> None:
        if kind == STRING:
            size = self.number("<Q")  # moves the cursor too
            self.at += size
        elif kind == ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in SCALARS:
                self.at += struct.calcsize(SCALARS[inner]) * count
            else:
                for _ in range(count):
                    self.skip(inner)
        else:
            self.at += struct.calcsize(SCALARS[kind])


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
