"""The arithmetic of the streamed merge on single matrices: of any rank, scale, type and shape."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.export.merge import blocks as merge_blocks
from finetune_assets.export.merge.blocks import _Block, _one_pass
from finetune_assets.export.merge.merge import merge
from finetune_assets.reporting.errors import StepFailed

torch = pytest.importorskip("torch")
MODULE = "model.layers.0.mlp.up_proj"
DTYPES = ["float32", "float16", "bfloat16"]


def merged(folder: Path, weight: Any, a: Any, b: Any, alpha: float, **changes: Any) -> Any:
    """The one matrix of a base, merged with its adapter; both are written to the folder first."""
    from safetensors.torch import load_file, save_file

    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    save_file({f"{MODULE}.weight": weight}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    lora = {"lora_A": a, "lora_B": b}
    save_file(
        {f"base_model.model.{MODULE}.{name}.weight": tensor for name, tensor in lora.items()},
        adapter / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": len(a), "lora_alpha": alpha}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    report = merge(base, adapter, folder / "out", **({"export_size": 5, "export_dtype": "auto"} | changes))
    assert (report["method"], report["merged"]) == ("streamed", 1)
    return load_file(folder / "out/model.safetensors")[f"{MODULE}.weight"]


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize(("rank", "scale"), [(8, 2.0), (8, 1.75), (8, math.sqrt(8)), (1, 0.5), (300, 1.0), (300, 3.0)])
def test_bits_of_the_whole_product(tmp_path: Path, rank: int, scale: float, stored: str) -> None:
    """PEFT multiplies whole matrices in float32; the base's type is rounded to once, at the end."""
    torch.manual_seed(0)
    weight, a, b = (torch.randn(shape) * 0.02 for shape in ((700, 1600), (rank, 1600), (700, rank)))
    weight = weight.to(getattr(torch, stored))
    ours = merged(tmp_path, weight, a, b, scale * rank)
    assert torch.equal(ours, (weight.float() + (b @ a) * (scale * rank / rank)).to(weight.dtype))


def test_one_pass_only_where_it_has_the_same_bits() -> None:
    """Else the test above has not seen both ways."""
    assert _one_pass(160, 8, 1600, 2.0, "cpu")
    assert not _one_pass(160, 8, 1600, 1.75, "cpu")


@pytest.mark.parametrize("made", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_any_type_from_any_type(tmp_path: Path, stored: str, made: Any) -> None:
    torch.manual_seed(0)
    weight, a, b = (torch.randn(shape) * 0.02 for shape in ((40, 64), (4, 64), (40, 4)))
    weight = weight.to(getattr(torch, stored))
    ours = merged(tmp_path, weight, a, b, 8, export_dtype=made)
    assert torch.equal(ours, (weight.float() + (b @ a) * 2).to(getattr(torch, made)))


@pytest.mark.parametrize("shape", [(5, 0), (0, 64), (1, 1), (33, 7)])
def test_matrices_of_any_shape(tmp_path: Path, shape: tuple[int, int]) -> None:
    rows, width = shape
    weight, a, b = torch.ones(shape), torch.full((4, width), 0.5), torch.full((rows, 4), 0.25)
    ours = merged(tmp_path, weight, a, b, 4)
    assert ours.shape == shape
    assert torch.equal(ours, torch.full(shape, 1.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_number_that_is_not_finite(dtype: str) -> None:
    kind = getattr(torch, dtype)
    limits = torch.finfo(kind)
    fine = torch.tensor([[0.0, -0.0, limits.max, limits.min, limits.tiny, -limits.tiny]], dtype=kind)
    block = _Block.of(3, 6, "float32", dtype, "cpu").first(1)
    block.made.copy_(fine)
    assert block.finite()
    nan = torch.tensor(math.nan, dtype=kind)
    for bad in (math.inf, -math.inf, nan, torch.copysign(nan, torch.tensor(-1.0, dtype=kind))):
        for place in range(6):
            block.made.copy_(fine)
            block.made[0, place] = bad
            assert not block.finite(), (bad, place)


def test_one_bad_number_among_many_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_blocks, "BLOCK", 1 << 10)
    weight, a, b = torch.zeros(200, 64), torch.zeros(4, 64), torch.zeros(200, 4)
    b[177, 2] = -math.inf
    with pytest.raises(StepFailed, match=r"up_proj\.weight is not finite once merged"):
        merged(tmp_path, weight, a, b, 4)
