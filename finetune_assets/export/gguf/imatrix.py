"""Measurement of an importance matrix: the inputs of each weight matrix while the merged model reads conversations.

Quantisation gives a weight a smaller error the larger its inputs are. The measure is llama.cpp's (tools/imatrix): the
mean square of each input column, over all tokens. As in llama.cpp, embeddings and output matrix are not measured: their
types have more bits anyway.

We watch the products, not the modules, and recognise a matrix by its address in memory. This finds the matrix of a
linear layer as well as that of an expert, which is one of many in a single parameter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.chat.template import encode_row
from finetune_assets.data.rows import read_split
from finetune_assets.export.gguf.imatrix_file import Inputs, write_imatrix
from finetune_assets.models.formats.gguf import Head, Tensor, read_head
from finetune_assets.models.formats.safetensors import FLOAT_NAMES
from finetune_assets.models.loading import Chat, load_chat, load_model, suited
from finetune_assets.reporting.errors import BadInput, StepFailed
from finetune_assets.reporting.events import Progress, StepProgress, message, silent

if TYPE_CHECKING:
    import torch

    from finetune_assets.machine.device import Device

TOKENS = 32_768  # read at most
LONGEST = 512  # tokens of a conversation that are read; llama-imatrix's own
SAME = 1e-3  # largest relative difference of two sums of a column's weights that were added in different orders


def measure(
    merged: Path,
    gguf: Path,
    rows: Path,
    out: Path,
    device: Device,
    *,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> None:
    """Have the merged model read conversations, and write the importance matrix of its GGUF file.

    On one device and precision, the same model and rows give the same bytes.

    Args:
        merged: Hugging Face folder with chat.json.
        gguf: the model in full precision, whose tensors the matrix is for.
        rows: train.jsonl or validation.jsonl.
        out: the file to write.

    Raises:
        BadInput: there are no rows.
        StepFailed: the model cannot be loaded, produces non-finite activations, or does not match `gguf`.
    """
    chosen = choose(rows, load_chat(merged, trust_remote_code=trust_remote_code))
    if not chosen:
        raise BadInput(
            f"gguf.imatrix is {rows.stem}, but there are no {rows.stem} rows",
            "raise dataset.val_size, or take gguf.imatrix: train",
        )
    device = suited(device, merged)
    progress(message(f"reading {rows.stem} rows to see which weights matter, on {device.name}"))
    model = load_model(merged, None, device, trust_remote_code=trust_remote_code)
    seen = named(collect(model, chosen, progress), dict(model.named_parameters()), gguf)
    write_imatrix(out, seen, dataset=rows.name, chunks=len(chosen), chunk_size=LONGEST)


def choose(rows: Path, chat: Chat, tokens: int = TOKENS, longest: int = LONGEST) -> list[list[int]]:
    """Choose conversations, as many as fit into so many tokens; return the ids of each.

    The choice depends on the content of the rows, not on their order in the file.
    """
    chosen: list[list[int]] = []
    for record in sorted(read_split(rows), key=lambda record: record["id"]):
        # mask_history: works with every template, and the ids are the same
        row = encode_row(
            chat.tokenizer, record["messages"],
            default_system=chat.default_system, cutoff_len=longest, mask_history=True,
        )  # fmt: skip
        tokens -= len(row.input_ids)
        if tokens < 0:
            break
        chosen.append(row.input_ids)
    return chosen


def collect(model: Any, chosen: Sequence[Sequence[int]], progress: Progress) -> dict[str, Inputs]:
    """Measure the inputs of each weight matrix while the model reads; return parameter name -> inputs, float64."""
    import torch
    from torch.overrides import TorchFunctionMode

    model.set_experts_implementation(
        "eager"
    )  # one product per expert; the faster implementations compute all experts in one
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    places: dict[int, tuple[str, int]] = {}  # address of a matrix -> parameter, expert
    for name, weight in model.named_parameters():
        if weight.dim() in (2, 3):
            experts = weight if weight.dim() == 3 else weight[None]
            places |= {expert.data_ptr(): (name, number) for number, expert in enumerate(experts)}
            sums[name] = torch.zeros(len(experts), weight.shape[-1], dtype=torch.float64)
            counts[name] = torch.zeros(len(experts), dtype=torch.int64)

    def watch(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        if (place := places.get(weight.data_ptr())) is not None:
            name, expert = place
            seen = inputs.reshape(-1, inputs.shape[-1])
            sums[name][expert] += seen.float().square().sum(0).cpu()
            counts[name][expert] += len(seen)

    class Watched(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func is torch.nn.functional.linear:
                watch(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    began, read, total = time.monotonic(), 0, sum(len(ids) for ids in chosen)
    for step, ids in enumerate(chosen, 1):
        with torch.inference_mode(), Watched():
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)
        read += len(ids)
        speed = read / max(time.monotonic() - began, 1e-9)
        left = (total - read) / speed
        progress(StepProgress(step=step, steps=len(chosen), tokens_per_second=speed, seconds_left=left))
    return {name: Inputs(sums[name].numpy(), counts[name].numpy()) for name in sums if counts[name].any()}


def named(seen: Mapping[str, Inputs], weights: Mapping[str, torch.Tensor], gguf: Path) -> dict[str, Inputs]:
    """Return the inputs by the names of a GGUF file's tensors, for matrices with the same columns in both.

    A converter may reorder a matrix. The order of rows does not matter here; a matrix with reordered columns gets no
    inputs.

    Args:
        seen: parameter name -> inputs.
        weights: parameter name -> weights.

    Raises:
        StepFailed: the installed gguf package does not know the architecture, or a sum is not finite.
    """
    import numpy as np

    head, inputs_of = read_head(gguf), {}
    targets = _targets(head)
    for name, inputs in seen.items():
        tensors = targets(name)
        if not tensors or not _same_columns(weights[name], tensors, gguf, head):
            continue
        if not (inputs.sums <= np.finfo(np.float32).max).all():  # not so for NaN
            raise StepFailed(f"the merged model produced non-finite activations ({name})", "train the adapter again")
        inputs_of |= {tensor.name: inputs for tensor in tensors}
    if not inputs_of:
        raise StepFailed(
            f"the gguf package names no weight matrix of {head.get('general.architecture')}: nothing was measured",
            "leave gguf.imatrix out for this model",
        )
    return inputs_of


def _targets(head: Head) -> Callable[[str], list[Tensor]]:
    """Return a function from a parameter's name to its tensors in a GGUF file's layers: none, one, or gate and up."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = head.get("general.architecture")
    known = [arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture]
    if not known:
        raise StepFailed(
            f"the installed gguf package does not know the architecture {architecture}",
            "upgrade gguf, or leave gguf.imatrix out",
        )
    names = get_tensor_name_map(known[0], head.get(f"{architecture}.block_count"))
    tensors = {tensor.name: tensor for tensor in head.tensors if tensor.name.startswith("blk.")}

    def targets(parameter: str) -> list[Tensor]:
        name = parameter.removesuffix(".weight")
        for parts in ([name], [name.replace("gate_up_proj", half) for half in ("gate_proj", "up_proj")]):
            found = [tensors.get(f"{names.get_name(part)}.weight") for part in dict.fromkeys(parts)]
            if None not in found:
                return [tensor for tensor in found if tensor is not None]
        return []

    return targets


def _same_columns(weight: torch.Tensor, tensors: Sequence[Tensor], gguf: Path, head: Head) -> bool:
    """Return whether the tensors together have the columns of the weight, in any order of rows."""
    import numpy as np
    import torch

    data = np.memmap(gguf, dtype=np.uint8, mode="c")
    ours = _column_sums(weight.reshape(-1, *weight.shape[-2:]))
    theirs = torch.zeros_like(ours)
    for tensor in tensors:
        if tensor.shape[0] != ours.shape[1] or tensor.elements % ours.numel():
            return False
        begin = head.data_start + tensor.offset
        values = torch.from_numpy(data[begin : begin + tensor.nbytes]).view(getattr(torch, FLOAT_NAMES[tensor.type]))
        theirs += _column_sums(values.reshape(len(ours), -1, ours.shape[1]))
    return torch.allclose(ours, theirs, rtol=SAME, atol=0.0)


def _column_sums(experts: torch.Tensor) -> torch.Tensor:
    """Sum the magnitudes of (experts, rows, columns) along the rows: float32 on the CPU, (experts, columns)."""
    import torch

    return torch.stack([expert.abs().sum(0, dtype=torch.float32).cpu() for expert in experts])
