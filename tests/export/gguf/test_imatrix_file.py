"""The importance matrix's file: what llama.cpp reads, and reading it back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finetune_assets.export.gguf import imatrix_file
from finetune_assets.export.gguf.imatrix_file import Inputs
from finetune_assets.reporting.errors import StepFailed


def test_the_file_is_llama_cpp_s(tmp_path: Path) -> None:
    from gguf import GGUFReader

    sums = {"blk.0.ffn_up.weight": np.arange(6.0)[None], "blk.0.ffn_up_exps.weight": np.arange(6.0).reshape(2, 3) + 1}
    counts = {"blk.0.ffn_up.weight": np.array([4]), "blk.0.ffn_up_exps.weight": np.array([2, 0])}
    seen = {name: Inputs(sums[name], counts[name]) for name in sums}
    file = tmp_path / "imatrix.gguf"
    imatrix_file.write_imatrix(file, seen, dataset="train.jsonl", chunks=3, chunk_size=512)
    reader = GGUFReader(file)
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert values == {
        "general.type": "imatrix",
        "imatrix.datasets": ["train.jsonl"],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 512,
    }
    theirs = {tensor.name: (tensor.shape.tolist(), tensor.data.tolist()) for tensor in reader.tensors}
    assert theirs == {
        "blk.0.ffn_up.weight.in_sum2": ([6], [0, 1, 2, 3, 4, 5]),
        "blk.0.ffn_up.weight.counts": ([1], [4]),
        "blk.0.ffn_up_exps.weight.in_sum2": ([3, 2], [[1, 2, 3], [4, 5, 6]]),
        "blk.0.ffn_up_exps.weight.counts": ([1, 2], [[2], [0]]),
    }
    found = imatrix_file.read_imatrix(file)
    assert (found.file, found.dataset, found.chunks) == ("imatrix.gguf", "train.jsonl", 3)
    assert {name: mean.tolist() for name, mean in found.values.items()} == {
        "blk.0.ffn_up.weight": [[0, 0.25, 0.5, 0.75, 1, 1.25]],
        "blk.0.ffn_up_exps.weight": [[0.5, 1, 1.5], [1, 1, 1]],  # all alike for the expert that nothing was sent to
    }
    again = tmp_path / "again.gguf"
    imatrix_file.write_imatrix(again, imatrix_file.read_inputs(file), dataset="train.jsonl", chunks=3, chunk_size=512)
    assert again.read_bytes() == file.read_bytes()
    file.write_bytes(b"something else")
    with pytest.raises(StepFailed, match="is not a GGUF file"):
        imatrix_file.read_imatrix(file)
