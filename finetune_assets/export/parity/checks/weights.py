"""Every weight of a GGUF file against the merged model's: bit by bit where the type is exact, else row by row.

Distributions hide much: a coarse type's quantisation error outweighs a wrong row, and a token that no conversation uses
has no effect on them. Comparing the weights finds both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_assets.export.gguf.form import short
from finetune_assets.export.parity.checks.architecture import EXPERT, PLAIN, architecture, renamed
from finetune_assets.export.parity.checks.failure import Failure
from finetune_assets.machine.cores import cores
from finetune_assets.models.formats.gguf import Head, Tensor
from finetune_assets.models.formats.safetensors import Checkpoint

if TYPE_CHECKING:
    import numpy as np
    import torch

# Of the architectures in `PLAIN`, the ones whose queries and keys are laid out for rotation by pairs of neighbours
# instead of halves, and the ones whose norms lack the one that is added to their weights.
PAIRED = {"llama", "smollm3"}
ONE_LESS = {"gemma3"}

# Largest relative error of a row (root mean square) that a tensor's type explains; other types are exact. A row of
# zeros has an error of 1. Figures: docs/decisions.md#relative-error-of-a-row-of-weights
ROUNDING = {
    "Q8_0": 0.025, "Q6_K": 0.08, "Q5_K": 0.15, "Q5_1": 0.15, "Q5_0": 0.2, "Q4_K": 0.3, "Q4_1": 0.3, "Q4_0": 0.4,
    "Q3_K": 0.55, "Q2_K": 0.95,
}  # fmt: skip
# An importance matrix gives up columns that matter little, so more is allowed, but never the error of a row of zeros.
MATRIX = "quantize.imatrix.entries_count"
TIMES_WITH_MATRIX, MOST = 3, 0.95
# The scales of blocks are float16, no finer than 2^-24: the weights of a block are whole multiples of its scale (times
# a second one in K-quants), of up to so much. Rows of next to nothing, such as those of unused tokens, feel it.
STEPS = {"Q8_0": 127, "Q6_K": 128 * 32, "Q5_K": 63 * 31, "Q4_K": 63 * 15}
FINEST = 2**-24
SUBNORMAL = 2e-38  # what is smaller may be nothing in another arithmetic

CHUNK = 1 << 20  # weights compared at a time


def check_weights(head: Head, gguf: Path, merged: Path) -> list[Failure]:
    """Return the row with the largest error if it is above its limit; nothing for architectures outside `PLAIN`.

    Args:
        merged: Hugging Face folder. Tensors that the file lacks, or has in a different shape, fail another check.
    """
    import numpy as np

    if architecture(head) not in PLAIN:
        return []
    data, name_of = np.memmap(gguf, dtype=np.uint8, mode="r"), renamed(head)
    held = {tensor.name: tensor for tensor in head.tensors}
    limits = ROUNDING
    if head.get(MATRIX) is not None:
        limits = {kind: min(MOST, TIMES_WITH_MATRIX * limit) for kind, limit in ROUNDING.items()}

    def look(name: str) -> tuple[float, str, str] | None:
        tensor, spec = held.get(name_of(name) or ""), checkpoint.spec(name)
        if tensor is None or short(tensor.shape[: len(spec.shape)]) != short(spec.shape[::-1]):
            return None
        count, expert = math.prod(spec.shape[:-1]), EXPERT.search(name)
        first = int(expert[1]) * count if expert else 0
        wanted = _as_in_gguf(head, tensor.name, checkpoint.tensor(name))
        if wanted is None or first + count > tensor.rows:
            return None
        rows = data[head.data_start + tensor.offset :][: tensor.nbytes].reshape(tensor.rows, -1)[first : first + count]
        return _furthest(tensor, rows, wanted.reshape(count, -1), first, limits.get(tensor.type))

    with Checkpoint(merged) as checkpoint, ThreadPoolExecutor(min(cores(), 8)) as pool:
        found = [one for one in pool.map(look, checkpoint) if one is not None]
    if not found:
        return []
    _, measured, allowed = max(found)
    return [Failure("weights", measured, allowed)]


def _as_in_gguf(head: Head, name: str, ours: torch.Tensor) -> torch.Tensor | None:
    """Return a tensor of the merged model as the converter lays it out; None if the file's head count does not fit."""
    import torch

    part = name.split(".")[-2]
    if architecture(head) in ONE_LESS and name.endswith("norm.weight"):
        return (ours if ours.dtype == torch.float16 else ours.float()) + 1
    if architecture(head) in PAIRED and part in ("attn_q", "attn_k"):
        heads = head.get(f"{architecture(head)}.attention.{'head_count' if part == 'attn_q' else 'head_count_kv'}")
        if not isinstance(heads, int) or len(ours) % (2 * heads):
            return None
        return ours.reshape(heads, 2, len(ours) // heads // 2, -1).transpose(1, 2).reshape(ours.shape)
    return ours


def _furthest(
    tensor: Tensor, rows: np.ndarray, wanted: torch.Tensor, begin: int, allowed: float | None
) -> tuple[float, str, str] | None:
    """Return the worst of the rows with an error above the limit: its error, a description, and the limit.

    Args:
        rows: bytes of the tensor's rows from `begin` on.
        allowed: largest relative error of a row; None: none at all.
    """
    import numpy as np
    import torch

    finest = STEPS.get(tensor.type, 32) * FINEST
    decode, stored = _decoder(tensor), {"F16": torch.float16, "BF16": torch.bfloat16}.get(tensor.type, torch.float32)
    step = max(1, CHUNK // wanted.shape[1])
    worst: tuple[float, str, str] | None = None
    for first in range(0, len(rows), step):
        found = decode(rows[first : first + step])
        ours = wanted[first : first + step].to(stored).float().numpy()
        if np.array_equal(found, ours):
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            error, size = _root_mean_square(found - ours), _root_mean_square(ours)
            same = (np.abs(found - ours) <= SUBNORMAL).all(-1)
            right = same if allowed is None else error <= allowed * size + finest  # false for non-finite values, too
            off = np.where(right, -1, np.nan_to_num(error / np.maximum(size, 1e-30), nan=np.inf))
        far = float(off.max())
        if far >= 0 and (worst is None or far > worst[0]):
            row = begin + first + int(off.argmax())
            what = f"row {row} of {tensor.name} ({tensor.type}): relative error {far:.2g}"
            worst = (far, what, "nothing" if allowed is None else f"{allowed:g}")
    return worst


def _root_mean_square(rows: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.sqrt(np.square(rows, dtype=np.float64).mean(-1))


def _decoder(tensor: Tensor) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function that turns rows of bytes into rows of float32."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(tensor.type_number)
    return lambda rows: dequantize(rows, kind)
