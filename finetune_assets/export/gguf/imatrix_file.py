"""An importance matrix on disk, in llama.cpp's own GGUF form: what llama-imatrix writes and llama-quantize reads.

Of every weight matrix NAME there are two float32 tensors: `NAME.in_sum2`, the sums of the squares of each column's
inputs, a row for each expert, and `NAME.counts`, how many inputs that were. After tools/imatrix/imatrix.cpp and
common/imatrix-loader.cpp of llama.cpp b10605; its older form (.dat) is not read.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.export.gguf.quantise import Imatrix
from finetune_assets.models.formats.gguf import ARRAY, STRING, TENSOR_TYPES, UINT32, Head, Tensor, read_head

if TYPE_CHECKING:
    import numpy as np

FILE = "imatrix.gguf"
SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Inputs:
    """What went through one weight matrix.

    Attributes:
        sums: of the squares, by column. Shape (experts or 1, columns).
        counts: how many inputs each expert had. Shape (experts or 1,).
    """

    sums: np.ndarray
    counts: np.ndarray


def write_imatrix(file: Path, seen: Mapping[str, Inputs], *, dataset: str, chunks: int, chunk_size: int) -> None:
    """Write what the matrices of a GGUF file were given: tensor name -> inputs.

    Args:
        dataset: what was read, by a name that means the same on every machine.
        chunks, chunk_size: how many texts were read, and the most tokens of one.
    """
    import numpy as np

    arrays: dict[str, np.ndarray] = {}
    for name in sorted(seen):
        arrays[name + SUMS] = seen[name].sums.astype(np.float32)
        arrays[name + COUNTS] = seen[name].counts.astype(np.float32)[:, None]
    raw = {
        "general.type": (STRING, _text("imatrix")),
        "imatrix.datasets": (ARRAY, struct.pack("<IQ", STRING, 1) + _text(dataset)),
        "imatrix.chunk_count": (UINT32, struct.pack("<I", chunks)),
        "imatrix.chunk_size": (UINT32, struct.pack("<I", chunk_size)),
    }
    table = [Tensor(name, _shape(array), TENSOR_TYPES["F32"].number, 0) for name, array in arrays.items()]
    head = Head(3, raw, tuple(table), 0).with_tensors(["F32"] * len(table))
    with file.open("wb") as out:
        out.write(head.encode())
        start = out.tell()
        for tensor, array in zip(head.tensors, arrays.values(), strict=True):
            out.write(bytes(start + tensor.offset - out.tell()))
            out.write(array.tobytes())
        out.write(bytes(-(out.tell() - start) % head.alignment))


def read_inputs(file: Path) -> dict[str, Inputs]:
    """Tensor name -> inputs, float32 as the file has them.

    Raises:
        StepFailed: not a GGUF file, or cut short.
    """
    import numpy as np

    head = read_head(file)
    data = np.fromfile(file, np.uint8)[head.data_start :]
    arrays = {
        tensor.name: data[tensor.offset : tensor.offset + tensor.nbytes].view(np.float32).reshape(-1, tensor.shape[0])
        for tensor in head.tensors
    }
    names = [name.removesuffix(SUMS) for name in arrays if name.endswith(SUMS)]
    return {name: Inputs(arrays[name + SUMS], arrays[name + COUNTS].reshape(-1)) for name in names}


def read_imatrix(file: Path) -> Imatrix:
    """Return the importance matrix to quantise with: mean squares, as llama-quantize reads them from this file.

    Raises:
        StepFailed: not a GGUF file, or cut short.
    """
    import numpy as np

    head, values = read_head(file), {}
    for name, inputs in read_inputs(file).items():
        counts = inputs.counts[:, None]
        # all columns alike for an expert that nothing was sent to
        values[name] = np.divide(inputs.sums, counts, out=np.ones_like(inputs.sums), where=counts > 0)
    datasets, chunks = head.get("imatrix.datasets", [""]), head.get("imatrix.chunk_count", 0)
    return Imatrix(values, file=file.name, dataset=datasets[0], chunks=chunks)


def facts(file: Path, made: Path) -> dict[str, Any]:
    """Return what an importance matrix was computed from, and the quantised tensors that it does not cover.

    Returns:
        conversations, tokens: that were read; entries: matrices with statistics; unused_experts: of them all, those
        that no token was sent to; without: names of the quantised tensors that have no statistics.
    """
    head, seen = read_head(file), read_inputs(file)
    return {
        "conversations": head.get("imatrix.chunk_count"),
        "tokens": int(max(inputs.counts.max() for inputs in seen.values())),
        "entries": len(seen),
        "unused_experts": int(sum((inputs.counts == 0).sum() for inputs in seen.values())),
        "without": [
            tensor.name for tensor in read_head(made).tensors if tensor.is_quantised and tensor.name not in seen
        ],
    }


def _shape(array: np.ndarray) -> tuple[int, ...]:
    """ggml's: columns first, and no dimension of one behind them."""
    rows, columns = array.shape
    return (columns, rows) if rows > 1 else (columns,)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
