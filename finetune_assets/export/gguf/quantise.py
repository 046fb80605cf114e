"""Quantisation of a GGUF file of full precision to the types of a recipe, tensor by tensor.

The bytes of each tensor equal those of llama.cpp's `llama_model_quantize`, with and without an importance matrix. Types
that need a matrix (q2_k_s, iq1 to iq3) are not supported. Memory is a few blocks of rows per thread. The metadata are
copied byte for byte, in the form of `form`.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_assets.export.gguf import ggml
from finetune_assets.export.gguf.form import FILE_TYPE, in_form, in_order
from finetune_assets.export.gguf.type_policy import EMBEDDINGS, tensor_types
from finetune_assets.machine.cores import cores
from finetune_assets.models.formats.gguf import STRING, TENSOR_TYPES, UINT32, Head, Tensor, read_head
from finetune_assets.recipe.gguf_types import FILE_TYPES, IMATRIX_TYPES, UNQUANTISED
from finetune_assets.reporting.errors import BadInput, StepFailed

if TYPE_CHECKING:
    import numpy as np

CHUNK = 1 << 18  # weights quantised at a time: 1 MiB in float32
MOST_WORKERS = 32
MOST_TEXT = 127  # bytes of a text that llama.cpp copies from an importance matrix


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix: the mean square of each weight matrix's inputs, by column, while the model read some text.

    `values` maps a GGUF tensor's name to float32 (experts or 1, columns); an expert without tokens has ones. A matrix
    without an entry is quantised as without an importance matrix. The other fields are written to the metadata of the
    quantised file (quantize.imatrix.*): the matrix' file, the text that was read, and its number of chunks.
    """

    values: Mapping[str, np.ndarray]
    file: str = ""
    dataset: str = ""
    chunks: int = 0


def make_types(
    source: Path, types: list[str], out_dir: Path, name: str, imatrix: Imatrix | None = None
) -> dict[str, Path]:
    """Make `out_dir`/`name`-TYPE.gguf for each type from a GGUF file of type f32, f16 or bf16.

    The same source gives the same bytes. If the source already has a type, that file is a hard link to it, or a
    copy. The importance matrix affects the types of IMATRIX_TYPES only.

    Raises:
        BadInput: an unknown type.
        StepFailed: the source is quantised or damaged, a weight exceeds the range of float16 or of a block's scale, or
            the importance matrix holds NaN or belongs to a different model.
    """
    if unknown := [kind for kind in types if kind not in FILE_TYPES]:
        raise BadInput(f"unknown GGUF type {unknown[0]!r}", f"known: {', '.join(FILE_TYPES)}")
    head = read_head(source)
    has = {number: kind for kind, number in FILE_TYPES.items()}.get(head.get("general.file_type"))
    if has not in UNQUANTISED:
        raise StepFailed(f"{source} is not of full precision: GGUF types are quantised from f32, f16 or bf16 only")
    out_dir.mkdir(parents=True, exist_ok=True)
    files = {kind: out_dir / f"{name}-{kind}.gguf" for kind in types}
    for kind, file in files.items():
        if kind == has:
            link_or_copy(source, file)
        else:
            _make(source, head, kind, file, imatrix if imatrix and imatrix.values and kind in IMATRIX_TYPES else None)
    return files


def link_or_copy(source: Path, target: Path) -> None:
    """Link a file to a second name, or copy it if the file system has no links; do nothing if the link exists."""
    if target.exists() and source.samefile(target):
        return
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _make(source: Path, head: Head, kind: str, file: Path, imatrix: Imatrix | None) -> None:
    head = replace(head, tensors=in_order(head.tensors))
    made = head.with_value(FILE_TYPE, UINT32, FILE_TYPES[kind])
    if imatrix is not None:
        made = _telling_of(imatrix, made)
    made = in_form(made.with_tensors(tensor_types(head, kind, imatrix is not None)))
    importance = _importance(imatrix, head, made) if imatrix is not None else {}
    encoded = made.encode()
    file.unlink(missing_ok=True)  # it may be a second name of another file
    with source.open("rb", buffering=0) as data, file.open("wb", buffering=0) as out:
        out.write(encoded)
        out.truncate(len(encoded) + made.data_size)  # what lies between tensors is zero
        _convert_all(_blocks(head, made, len(encoded), importance), data.fileno(), out.fileno())


def _telling_of(imatrix: Imatrix, head: Head) -> Head:
    """Return the head with the metadata by which llama.cpp describes the importance matrix."""
    for key, text in (("file", imatrix.file), ("dataset", imatrix.dataset)):
        if text:
            short = text.encode()[:MOST_TEXT].decode(errors="ignore")
            head = head.with_value(f"quantize.imatrix.{key}", STRING, short)
    for key, number in (("entries_count", len(imatrix.values)), ("chunks_count", imatrix.chunks)):
        if number:
            head = head.with_value(f"quantize.imatrix.{key}", UINT32, number)
    return head


def _importance(imatrix: Imatrix, head: Head, made: Head) -> dict[str, np.ndarray]:
    """Return name -> (experts or 1, columns) for the quantised tensors; StepFailed if the matrix does not fit them."""
    import numpy as np

    importance: dict[str, np.ndarray] = {}
    for before, after in zip(head.tensors, made.tensors, strict=True):
        values = imatrix.values.get(before.name)
        if values is None or before.type == after.type:
            continue
        matrices, columns = before.matrices, before.shape[0]
        if values.size == matrices * columns:
            importance[before.name] = np.ascontiguousarray(values, np.float32).reshape(matrices, columns)
        elif before.name not in EMBEDDINGS:  # their inputs are token ids, so that a matrix may hold any values for them
            raise StepFailed(
                f"the importance matrix has {values.size} values for {before.name} instead of {matrices} x {columns}",
                "measure the importance matrix of this model",
            )
    for name, values in importance.items():
        if not np.isfinite(values).all():
            raise StepFailed(f"the importance matrix holds NaN or infinite values for {name}", "make it again")
    return importance


@dataclass(frozen=True)
class _Block:
    """Some rows of a tensor; `read_at` and `write_at` are the offsets of their bytes in the two files."""

    before: Tensor
    after: Tensor
    rows: int
    read_at: int
    write_at: int
    importance: np.ndarray | None  # (columns,)


def _blocks(head: Head, made: Head, data_start: int, importance: dict[str, np.ndarray]) -> Generator[_Block]:
    """Yield all tensors in blocks of at most CHUNK weights, or of one row; a block has rows of one expert only."""
    for before, after in zip(head.tensors, made.tensors, strict=True):
        read_at, write_at = head.data_start + before.offset, data_start + after.offset
        step = max(1, CHUNK // before.shape[0])
        for matrix in range(before.matrices):
            weights = importance[before.name][matrix] if before.name in importance else None
            left = before.rows // before.matrices
            while left:
                rows = min(step, left)
                yield _Block(before, after, rows, read_at, write_at, weights)
                left -= rows
                read_at += rows * before.row_size
                write_at += rows * after.row_size


def _convert_all(blocks: Generator[_Block], source: int, target: int) -> None:
    """Convert all blocks from one open file to another, in threads: ggml and file access release Python's lock."""
    taking = threading.Lock()

    def work() -> None:
        scratch = _Scratch()
        while True:
            with taking:
                block = next(blocks, None)
            if block is None:
                return
            _write(target, scratch.converted(block, source), block.write_at)

    workers = min(cores(), MOST_WORKERS)
    with ThreadPoolExecutor(workers) as pool:
        try:
            for done in as_completed([pool.submit(work) for _ in range(workers)]):
                done.result()
        finally:
            with taking:
                blocks.close()  # so that the other threads stop too


def _write(file: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(file, data, at)
        data, at = data[written:], at + written


class _Scratch:
    """The memory of one thread, which all of its blocks share."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def _bytes(self, use: str, size: int) -> np.ndarray:
        import numpy as np

        if use not in self.arrays or len(self.arrays[use]) < size:
            self.arrays[use] = np.empty(size, np.uint8)
        return self.arrays[use][:size]

    def converted(self, block: _Block, source: int) -> memoryview:
        """Return the block's bytes in its new type, valid until the next call; quantisers read float32."""
        import numpy as np

        before, after = block.before, block.after
        data = self._bytes("read", block.rows * before.row_size)
        if os.preadv(source, [data.data], block.read_at) < len(data):
            raise StepFailed(f"the source ends within tensor {before.name}", "make it again")
        if before.type == after.type:
            return data.data
        if before.type == "F32":
            values = data.view(np.float32)
        elif not before.is_quantised:
            values = self._bytes("float32", block.rows * before.shape[0] * 4).view(np.float32)
            ggml.to_float32(data, before.type, values)
        else:
            raise StepFailed(f"tensor {before.name} is {before.type}, not F32, F16 or BF16")
        if not np.isfinite(values).all():
            raise StepFailed(f"tensor {before.name} holds NaN or infinite values", "train the adapter again")
        made = self._bytes("write", block.rows * after.row_size)
        ggml.quantise(values.reshape(block.rows, -1), after.type, made, block.importance)
        stored = TENSOR_TYPES[after.type]
        for at in stored.scales:
            parts = made.reshape(-1, stored.size)[:, at : at + 2]
            if not np.isfinite(parts.copy().view(np.float16)).all():
                raise StepFailed(f"tensor {before.name} holds weights beyond {after.type}", "set gguf.types to bf16")
        return made.data
