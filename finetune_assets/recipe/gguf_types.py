"""The GGUF types that can be made: the one table from which every other list of types is derived."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class GgufType:
    """A type of GGUF file.

    Attributes:
        name: as recipes write it.
        file_type: llama.cpp's number (enum llama_ftype), written as general.file_type.
        tensor_type: the ggml type of most matrices in the file; the export decides the type of each.
        bits: bits per weight of Llama 3.1 8B; another model mixes its tensor types slightly differently.
        uses_imatrix: whether an importance matrix changes the file; else every weight is quantised by itself.
    """

    name: str
    file_type: int
    tensor_type: str
    bits: float
    uses_imatrix: bool

    @property
    def is_quantised(self) -> bool:
        """Whether the weights are quantised, not only converted to another float."""
        return self.tensor_type not in ("F32", "F16", "BF16")


# Largest first: tables list the types in this order.
# Bits: https://github.com/ggml-org/llama.cpp/blob/master/tools/quantize/README.md; export.gguf.type_policy agrees.
TYPES: dict[str, GgufType] = {
    row.name: row
    for row in (
        GgufType("f32", 0, "F32", 32.0, uses_imatrix=False),
        GgufType("f16", 1, "F16", 16.0, uses_imatrix=False),
        GgufType("bf16", 32, "BF16", 16.0, uses_imatrix=False),
        GgufType("q8_0", 7, "Q8_0", 8.50, uses_imatrix=False),
        GgufType("q6_k", 18, "Q6_K", 6.56, uses_imatrix=True),
        GgufType("q5_k_m", 17, "Q5_K", 5.70, uses_imatrix=True),
        GgufType("q5_k_s", 16, "Q5_K", 5.57, uses_imatrix=True),
        GgufType("q5_1", 9, "Q5_1", 6.04, uses_imatrix=True),
        GgufType("q5_0", 8, "Q5_0", 5.57, uses_imatrix=True),
        GgufType("q4_k_m", 15, "Q4_K", 4.89, uses_imatrix=True),
        GgufType("q4_k_s", 14, "Q4_K", 4.67, uses_imatrix=True),
        GgufType("q4_1", 3, "Q4_1", 5.10, uses_imatrix=True),
        GgufType("q4_0", 2, "Q4_0", 4.64, uses_imatrix=True),
        GgufType("q3_k_l", 13, "Q3_K", 4.30, uses_imatrix=True),
        GgufType("q3_k_m", 12, "Q3_K", 4.00, uses_imatrix=True),
        GgufType("q3_k_s", 11, "Q3_K", 3.64, uses_imatrix=True),
        GgufType("q2_k", 10, "Q2_K", 3.16, uses_imatrix=True),
    )
}
FILE_TYPES = {name: row.file_type for name, row in TYPES.items()}
UNQUANTISED = tuple(name for name, row in TYPES.items() if not row.is_quantised)
IMATRIX_TYPES = tuple(name for name, row in TYPES.items() if row.uses_imatrix)


def lossless_type(dtypes: Collection[str]) -> str:
    """Return the unquantised type that loses nothing of weights stored in these safetensors dtypes.

    Args:
        dtypes: "F32", "BF16", ..., each once; weights of several dtypes are converted to float32.
    """
    by_dtype = {TYPES[name].tensor_type: name for name in UNQUANTISED}
    return by_dtype.get(next(iter(dtypes)), "f32") if len(dtypes) == 1 else "f32"
