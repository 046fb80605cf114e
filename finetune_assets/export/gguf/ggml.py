"""ggml's own conversions of rows of weights, called in the llama.cpp inside xllamacpp.

The results therefore equal those of llama.cpp, at its speed. The calls release Python's lock.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_assets.models.formats.gguf import TENSOR_TYPES
from finetune_assets.reporting.errors import StepFailed

if TYPE_CHECKING:
    import numpy as np

_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64
_FUNCTIONS = {
    "ggml_quantize_chunk": (ctypes.c_size_t, (ctypes.c_int, _POINTER, _POINTER, _COUNT, _COUNT, _COUNT, _POINTER)),
    "ggml_fp16_to_fp32_row": (None, (_POINTER, _POINTER, _COUNT)),
    "ggml_bf16_to_fp32_row": (None, (_POINTER, _POINTER, _COUNT)),
}
INSTALL = "pip install -c constraints.txt xllamacpp"
_TO_FLOAT32 = {"F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row"}


def to_float32(data: np.ndarray, kind: str, out: np.ndarray) -> None:
    """Fill `out` (float32) from the bytes of as many F16 or BF16 weights; both contiguous."""
    getattr(library(), _TO_FLOAT32[kind])(data.ctypes.data, out.ctypes.data, out.size)


def quantise(values: np.ndarray, kind: str, out: np.ndarray, importance: np.ndarray | None = None) -> None:
    """Fill `out` (bytes, as many as they are in the type `kind`) from float32 rows (n, columns); all contiguous.

    Args:
        importance: float32 (columns,), weight of the quantisation error in each column.
    """
    rows, columns = values.shape
    weights = None if importance is None else importance.ctypes.data
    number = TENSOR_TYPES[kind].number
    library().ggml_quantize_chunk(number, values.ctypes.data, out.ctypes.data, 0, rows, columns, weights)


@functools.cache
def library() -> ctypes.CDLL:
    """Load xllamacpp's extension module as a plain library: it exports ggml's functions.

    Raises:
        StepFailed: xllamacpp is not installed, or does not export the functions.
    """
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise StepFailed("cannot quantise GGUF files: xllamacpp is not installed", INSTALL)
    folder = Path(spec.origin).parent
    for file in sorted(folder.glob("xllamacpp*.so")):
        library = ctypes.CDLL(str(file))
        if all(hasattr(library, name) for name in _FUNCTIONS):
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
            return library
    raise StepFailed(
        f"cannot quantise GGUF files: xllamacpp in {folder} does not export {', '.join(_FUNCTIONS)}", INSTALL
    )
