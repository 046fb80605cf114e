"""Which weights matter: the inputs that each weight matrix of a merged model gets while it reads some conversations.

Quantising rounds a weight the more carefully the larger the inputs are that it is multiplied with. The measure is
llama.cpp's (tools/imatrix): the mean square of each input column, over all tokens. As there, the embeddings and the
output matrix get none: both are kept in a finer type anyway.

The products themselves are watched, not the modules: a matrix is known by the place of its weights in memory, whether
a linear layer uses it or an expert that is one of many in a single parameter.
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
SAME = 1e-3  # how far sums of a column's weights may be apart that were added up in another order


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
        StepFailed: the model cannot be loaded, computes no finite numbers, or is none that `gguf` names tensors for.
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
    """The conversations to read, by their ids, as many as fit into so many tokens.

    Which they are is decided by their content, not by the order of the file.
    """
    chosen: list[list[int]] = []
    for record in sorted(read_split(rows), key=lambda record: record["id"]):
        # mask_history: with it every template will do, and the ids are the same
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
    """What each weight matrix is multiplied with while the model reads: parameter name -> inputs, float64."""
    import torch
    from torch.overrides import TorchFunctionMode

    model.set_experts_implementation("eager")  # one product for each expert; the quicker ones make one of all
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    places: dict[int, tuple[str, int]] = {}  # where a matrix begins in memory -> parameter, expert
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
    """The inputs under the names of a GGUF file's tensors, of those matrices that have the same columns in both.

    Converters may reorder a matrix. Its rows do not matter here; where its columns are others, it gets no inputs.

    Args:
        seen: parameter name -> inputs.
        weights: parameter name -> weights.

    Raises:
        StepFailed: the installed gguf package does not know the architecture, or a sum is not finite.
    """
    import numpy as np

    head, found = read_head(gguf), {}
    targets = _targets(head)
    for name, inputs in seen.items():
        tensors = targets(name)
        if not tensors or not _same_columns(weights[name], tensors, gguf, head):
            continue
        if not (inputs.sums <= np.finfo(np.float32).max).all():  # not so for NaN
            raise StepFailed(f"the merged model computes numbers without end (in {name})", "train the adapter again")
        found |= {tensor.name: inputs for tensor in tensors}
    if not found:
        raise StepFailed(
            f"no weight matrix of {head.get('general.architecture')} is known by name, so that none gets statistics",
            "leave gguf.imatrix out for this model",
        )
    return found


def _targets(head: Head) -> Callable[[str], list[Tensor]]:
    """Of a parameter's name, the tensors in the layers of a GGUF file that it becomes: none, one, or gate and up."""
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
    """Whether the tensors, one below the other, have the columns of the weight, however their rows are ordered."""
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
    """Of the magnitudes of (experts, rows, columns) along the rows: float32 on the CPU, (experts, columns)."""
    import torch

    return torch.stack([expert.abs().sum(0, dtype=torch.float32).cpu() for expert in experts])
