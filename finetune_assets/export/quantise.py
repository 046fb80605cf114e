"""From one GGUF file of full precision to the types that a recipe asks for, tensor by tensor.

The bytes of each tensor are the ones that llama.cpp's `llama_model_quantize` makes without an importance matrix; the
types that cannot do without one (q2_k_s, iq1 to iq3) are not made. Memory is a few blocks of rows per thread; the
metadata are copied byte for byte.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.errors import BadInput, StepFailed
from finetune_assets.export.gguf_file import FILE_TYPES, TENSOR_TYPES, UINT32, Head, Tensor, read_head
from finetune_assets.export.type_policy import tensor_types

if TYPE_CHECKING:
    import numpy as np

SOURCES = {"f32", "f16", "bf16"}
CHUNK = 1 << 20  # weights quantised at a time: 4 MiB in float32
GGML_QUANTISATION_VERSION = 2

# Where the float16 scales (and minima) lie in a block of each type; llama.cpp checks the same ones.
SCALES = {
    "Q8_0": (0,), "Q5_1": (0, 2), "Q5_0": (0,), "Q4_1": (0, 2), "Q4_0": (0,),
    "Q6_K": (208,), "Q5_K": (0, 2), "Q4_K": (0, 2), "Q3_K": (108,), "Q2_K": (80, 82),
}  # fmt: skip


def make_types(source: Path, types: list[str], out_dir: Path, name: str) -> dict[str, Path]:
    """Make `out_dir`/`name`-TYPE.gguf for each type from a GGUF file of type f32, f16 or bf16.

    The same source gives the same bytes. A type that the source already has is a hard link to it (or a copy).

    Raises:
        BadInput: an unknown type.
        StepFailed: the source is quantised or damaged, or a weight fits neither float16 nor a block's scale.
    """
    if unknown := [kind for kind in types if kind not in FILE_TYPES]:
        raise BadInput(f"unknown GGUF type {unknown[0]!r}", f"known: {', '.join(FILE_TYPES)}")
    head = read_head(source)
    has = {number: kind for kind, number in FILE_TYPES.items()}.get(head.get("general.file_type"))
    if has not in SOURCES:
        raise StepFailed(f"{source} is not of full precision: types are made from f32, f16 or bf16 only")
    out_dir.mkdir(parents=True, exist_ok=True)
    files = {kind: out_dir / f"{name}-{kind}.gguf" for kind in types}
    for kind, file in files.items():
        if kind == has:
            link_or_copy(source, file)
        else:
            _make(source, head, kind, file)
    return files


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system cannot link."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _make(source: Path, head: Head, kind: str, file: Path) -> None:
    made = head.with_value("general.file_type", UINT32, FILE_TYPES[kind])
    made = made.with_value("general.quantization_version", UINT32, GGML_QUANTISATION_VERSION)
    made = made.with_tensors(tensor_types(head, kind))
    with file.open("wb") as out:
        out.write(made.encode())
        start = out.tell()
        for block in _in_parallel(source, head, made):
            if block.offset is not None:
                out.write(bytes(start + block.offset - out.tell()))
            out.write(block.data.result().data)
        # Readers expect the last tensor padded as well.
        out.write(bytes(-(out.tell() - start) % made.alignment))


class _Block:
    """Rows in the making; `offset` is set on the first block of a tensor."""

    def __init__(self, data: Future[Any], offset: int | None):
        self.data = data
        self.offset = offset


def _in_parallel(source: Path, head: Head, made: Head) -> Iterator[_Block]:
    """Blocks in file order, a few ahead of the writer: quantising leaves Python's lock."""
    import numpy as np

    workers = min(os.cpu_count() or 1, 8)
    waiting: deque[_Block] = deque()
    data = np.memmap(source, dtype=np.uint8, mode="r")
    with ThreadPoolExecutor(workers) as pool:
        try:
            for before, after in zip(head.tensors, made.tensors, strict=True):
                begin = head.data_start + before.offset
                rows = data[begin : begin + before.nbytes].reshape(
                    -1, before.nbytes * before.shape[0] // before.elements
                )
                step = max(1, CHUNK // before.shape[0])
                for first in range(0, len(rows), step):
                    job = pool.submit(_convert, rows[first : first + step], before, after)
                    waiting.append(_Block(job, after.offset if first == 0 else None))
                    if len(waiting) > workers:
                        yield waiting.popleft()
            yield from waiting
        finally:
            pool.shutdown(cancel_futures=True)


def _convert(rows: np.ndarray, before: Tensor, after: Tensor) -> np.ndarray:
    """Rows (n, bytes) of one type as rows of another; quantisers work from float32."""
    import numpy as np

    if before.type == after.type:
        return np.ascontiguousarray(rows).reshape(-1)
    if before.type == "F32":
        values = rows.view(np.float32)
    elif before.type == "F16":
        values = rows.view(np.float16).astype(np.float32)
    elif before.type == "BF16":
        values = (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        raise StepFailed(f"tensor {before.name} is {before.type}: types are made from F32, F16 or BF16 only")
    if not np.isfinite(values).all():
        raise StepFailed(f"tensor {before.name} holds NaN or infinite values", "train the adapter again")
    if after.type == "F32":
        return values.reshape(-1).view(np.uint8)
    if after.type == "F16":
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not np.isfinite(halves).all():
            raise StepFailed(f"tensor {before.name} does not fit float16", "ask for bf16 (gguf.types)")
        return halves.reshape(-1).view(np.uint8)
    from libgguf import quantize_rows

    made = quantize_rows(values, TENSOR_TYPES[after.type][0]).reshape(-1)
    blocks = made.reshape(-1, TENSOR_TYPES[after.type][2])
    for at in SCALES.get(after.type, ()):
        if not np.isfinite(blocks[:, at : at + 2].copy().view(np.float16)).all():
            raise StepFailed(f"tensor {before.name} holds weights beyond {after.type}", "ask for bf16 (gguf.types)")
    return made
