"""Reading and writing of safetensors files, one tensor at a time.

The safetensors library reads by memory map. Its writer needs a complete shard in memory, so this module writes itself:
the header is known before the first tensor is computed, and each tensor goes to its offset when it is ready.
The bytes are the same as those of the library's own `save_file`. Format:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.inputs.json_text import Refused, parse_json, read_model_json
from finetune_assets.inputs.regular_files import why_not_regular
from finetune_assets.reporting.errors import BadInput, StepFailed

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LONGEST_HEAD = 100_000_000  # bytes, the safetensors library's own limit
BYTES_OF = {  # in the order in which safetensors lays types out
    "U64": 8, "I64": 8, "F64": 8, "F32": 4, "U32": 4, "I32": 4, "BF16": 2, "F16": 2, "U16": 2, "I16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
# Bits of an element. The last types serve only to recognise a quantised model.
BITS = {name: 8 * size for name, size in BYTES_OF.items()} | {
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64,
}  # fmt: skip
WHOLE = {"F64", "F32", "F16", "BF16", "BOOL"}  # types of weights and masks that are not quantised
WEIGHT = re.compile(r"weight|\.W_q$|_blocks$")  # also qweight and weight_packed; HQQ; experts in MXFP4
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # by torch's names
FLOAT_NAMES = {stored: name for name, stored in FLOATS.items()}


@dataclass(frozen=True)
class Spec:
    """A tensor on disk: its name, safetensors dtype ("F32", "BF16", ...) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return BYTES_OF[self.dtype] * math.prod(self.shape)


class Checkpoint:
    """The safetensors file or files of a Hugging Face folder, opened for reading by tensor name.

    Raises:
        StepFailed: there are no safetensors weights, or a shard or tensor of the index is missing or damaged.
    """

    def __init__(self, folder: Path, single: str = SINGLE):
        self.folder = folder
        self._open = contextlib.ExitStack()
        self._handles: dict[str, Any] = {}
        self._places: dict[str, dict[str, int]] = {}
        self.file_of = self._index(single)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def spec(self, name: str) -> Spec:
        """Return the name, dtype and shape of a tensor without reading its data."""
        part = self._handle(self.file_of[name]).get_slice(name)
        return Spec(name, part.get_dtype(), tuple(part.get_shape()))

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor, on the CPU, in its stored dtype."""
        return self._handle(self.file_of[name]).get_tensor(name)

    def place(self, name: str) -> tuple[Path, int]:
        """Return the file that holds a tensor, and the offset of its first byte."""
        file = self.folder / self.file_of[name]
        if file.name not in self._places:
            begin, entries = read_head(file)
            self._places[file.name] = {key: begin + entry["data_offsets"][0] for key, entry in entries.items()}
        return file, self._places[file.name][name]

    def rows(self, name: str, at: Sequence[int]) -> torch.Tensor:
        """Read some rows of a tensor without the others; a vector is read completely."""
        import torch

        part = self._handle(self.file_of[name]).get_slice(name)
        return torch.cat([part[row : row + 1] for row in at]) if len(part.get_shape()) > 1 else part[:]

    def _index(self, single: str) -> dict[str, str]:
        if (self.folder / single).is_file():
            return dict.fromkeys(self._handle(single).keys(), single)
        if (file_of := read_index(self.folder, str(self.folder))) is None:
            raise StepFailed(
                f"{self.folder} has no {single} (nor an index of shards)",
                "weights are read from safetensors only; convert other formats with save_pretrained first",
            )
        held = {file: set(self._handle(file).keys()) for file in sorted(set(file_of.values()))}
        if lost := [name for name, file in file_of.items() if name not in held[file]]:
            raise StepFailed(
                f"{self.folder / INDEX}: tensor {lost[0]!r} is not in {file_of[lost[0]]}", "fetch the model again"
            )
        return file_of

    def _handle(self, file: str) -> Any:
        if file not in self._handles:
            from safetensors import SafetensorError, safe_open

            try:
                self._handles[file] = self._open.enter_context(safe_open(self.folder / file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise StepFailed(
                    f"cannot read {self.folder / file}: {error}", "fetch or materialise it again"
                ) from error
        return self._handles[file]


def read_index(folder: Path, called: str) -> dict[str, str] | None:
    """Return the file that holds each tensor, by tensor name; None if the folder does not have an index of shards.

    Args:
        called: the folder's name in error messages.

    Raises:
        StepFailed: the index is damaged, or names a file that is missing or in a different folder.
    """
    if not (folder / INDEX).is_file():
        return None
    try:
        file_of: dict[str, str] = read_model_json(folder / INDEX)["weight_map"]
        outside = [file for file in file_of.values() if Path(file).name != file]
    except BadInput as error:
        raise StepFailed(
            f"{called}: {INDEX} is not an index of shards ({error})", "fetch or materialise it again"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StepFailed(
            f"{called}: {INDEX} is not an index of shards ({error!r})", "fetch or materialise it again"
        ) from error
    if not file_of:
        raise StepFailed(f"{called}: {INDEX} does not name any tensors", "fetch or materialise it again")
    if outside:
        raise StepFailed(
            f"{called}: {INDEX} names {outside[0]}, which is not in the same folder",
            "put the shards into the model's folder, and only their file names into the index",
        )
    if missing := sorted(file for file in set(file_of.values()) if not (folder / file).is_file()):
        raise StepFailed(f"{called} is incomplete: {INDEX} names {missing[0]}, which does not exist", "fetch it again")
    return file_of


def stored_types(folder: Path) -> set[str]:
    """Return the safetensors dtypes in a Hugging Face folder, from the headers of its files alone."""
    types: set[str] = set()
    for file in sorted(folder.glob("model*.safetensors")):
        types |= {entry["dtype"] for entry in read_head(file)[1].values()}
    return types


def quantised_tensor(folder: Path) -> Spec | None:
    """Return the first quantised weight in a Hugging Face folder, from the headers of its files; None if there is none.

    Only weights count: many models also store integers that are not weights, such as positions and masks.
    """
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in read_head(file)[1].items():
            if entry["dtype"] not in WHOLE and WEIGHT.search(name):
                return Spec(name, entry["dtype"], tuple(entry["shape"]))
    return None


def read_head(file: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Return the offset of a file's data, and the header's entry of each tensor: dtype, shape, data_offsets.

    Raises:
        StepFailed: it is not a regular file, or does not have a safetensors header.
    """
    if (why := why_not_regular(file)) is not None:
        raise StepFailed(f"{file}: {why}", "fetch or materialise it again")
    try:
        with file.open("rb") as data:
            size = int.from_bytes(data.read(8), "little")
            if size > min(LONGEST_HEAD, file.stat().st_size - 8):
                raise Refused(f"its header would have {size} bytes")
            entries = parse_json(data.read(size).decode("utf-8"), clean=False)
        if not isinstance(entries, dict):
            raise Refused("its header is not an object")
        entries.pop("__metadata__", None)
        if wrong := next((name for name, entry in entries.items() if not _describes(entry)), None):
            raise Refused(f"its header does not describe the tensor {wrong[:60]!a}")
    except (OSError, ValueError) as error:
        raise StepFailed(f"{file} is not a safetensors file ({error})", "fetch or materialise it again") from error
    return 8 + size, entries


def _describes(entry: Any) -> bool:
    """Return whether this is a valid header entry of a tensor: https://github.com/huggingface/safetensors#format."""
    if not isinstance(entry, dict) or str(entry.get("dtype")) not in BITS:
        return False
    numbers = [entry.get("shape"), entry.get("data_offsets")]
    if not all(isinstance(part, list) and all(type(item) is int and item >= 0 for item in part) for part in numbers):
        return False
    if len(entry["data_offsets"]) != 2:
        return False
    begin, end = entry["data_offsets"]
    return (end - begin) * 8 == math.prod(entry["shape"]) * BITS[entry["dtype"]]


def plan_shards(specs: Iterable[Spec], limit: int) -> dict[str, list[Spec]]:
    """Assign tensors to files in order, up to `limit` bytes each; a larger tensor gets its own file."""
    shards: list[list[Spec]] = [[]]
    used = 0
    for spec in specs:
        if shards[-1] and used + spec.nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(spec)
        used += spec.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def in_file_order(specs: Iterable[Spec]) -> list[Spec]:
    """Sort tensors as safetensors does: wide types first (alignment), then by name."""
    order = list(BYTES_OF)
    return sorted(specs, key=lambda spec: (order.index(spec.dtype), spec.name))


def head(specs: Sequence[Spec]) -> tuple[bytes, list[int]]:
    """Return the header of a file with these tensors (see `in_file_order`), and each tensor's offset in the file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [at, at + spec.nbytes]
        }  # fmt: skip
        at += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return start, [len(start) + header[spec.name]["data_offsets"][0] for spec in specs]


def write_index(folder: Path, shards: dict[str, list[Spec]]) -> None:
    """Write the index of several shards; a single file does not need one."""
    if len(shards) == 1:
        return
    total = sum(spec.nbytes for shard in shards.values() for spec in shard)
    weight_map = {spec.name: file for file, shard in shards.items() for spec in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
