"""Harms of merged models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.corruptions.files import cut
from tests.support.corruptions.harm import Harm


def _in_tensors(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def strike(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, broken := file.with_suffix(".broken"), {"format": "pt"})
        broken.replace(file)

    return strike


def _zero(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"].zero_()


def _swap(tensors: dict[str, Any]) -> None:
    one, two = (f"model.layers.{number}.self_attn.o_proj.weight" for number in (0, 1))
    tensors[one], tensors[two] = tensors[two], tensors[one]


def _permute(tensors: dict[str, Any]) -> None:
    """Queries as llama.cpp has them."""
    name = "model.layers.0.self_attn.q_proj.weight"
    matrix = tensors[name]
    tensors[name] = matrix.reshape(2, -1, matrix.shape[1]).transpose(0, 1).reshape(matrix.shape).contiguous()


def _drop(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.input_layernorm.weight"].fill_(1)


def _flip(tensors: dict[str, Any]) -> None:
    """The highest bits of a weight; the lowest are within what different sums of the same numbers differ by."""
    weight = tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[-1:].numpy().view(np.uint8)
    weight[-1] ^= 2


def _another_base(folder: Path) -> None:
    """The base's weights were one per cent others when the adapter was trained."""
    import torch

    torch.manual_seed(0)

    def shift(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor * (1 + 0.01 * torch.randn(tensor.shape, dtype=tensor.dtype))

    _in_tensors(shift)(folder)


def _cut_weights(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    cut(file)


def _rope(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("rope_theta", None)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 123.0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


MERGED_HARMS: tuple[Harm[Callable[[Path], None]], ...] = (
    Harm("one tensor zeroed", "weights", _in_tensors(_zero)),
    Harm("two tensors swapped", "weights", _in_tensors(_swap)),
    Harm("queries permuted", "weights", _in_tensors(_permute)),
    Harm("a norm of ones", "weights", _in_tensors(_drop)),
    Harm("one bit of a weight flipped", "weights", _in_tensors(_flip)),
    Harm("adapter of another base", "logits", _another_base),
    Harm("cut at 90 %", "safetensors", _cut_weights),
    Harm("wrong rope base", "logits", _rope),
)
