"""LoRA and its variants: low-rank updates of linear layers, the base model frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune_assets.recipe import TrainSection, did_you_mean
from finetune_assets.reporting.errors import BadInput

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel


def lora_config(train: TrainSection, network: PreTrainedModel) -> LoraConfig:
    """Return the LoRA settings (https://arxiv.org/abs/2106.09685) for `network`.

    Variants: rsLoRA (2312.03732), DoRA (2402.09353), PiSSA (2404.02948).

    Raises:
        BadInput: train.lora_target names a module that the model does not have, or that LoRA cannot adapt.
    """
    from peft import LoraConfig

    initial: Any = True
    if train.pissa_init:
        initial = f"pissa_niter_{train.pissa_iter}" if train.pissa_iter >= 0 else "pissa"
    return LoraConfig(
        task_type="CAUSAL_LM",
        init_lora_weights=initial,
        r=train.lora_rank,
        lora_alpha=train.lora_alpha or 2 * train.lora_rank,
        lora_dropout=train.lora_dropout,
        target_modules=lora_targets(train.lora_target, network),
        use_rslora=train.use_rslora,
        use_dora=train.use_dora,
        bias="none",
    )


def lora_targets(target: str, network: PreTrainedModel) -> list[str]:
    """Return the names of the linear layers to adapt: all but the output layer, or those of a comma-separated list.

    Each name is checked, since PEFT silently ignores unknown names.
    """
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    head = network.get_output_embeddings()
    known = sorted(
        {
            name.rpartition(".")[2]
            for name, module in network.named_modules()
            if isinstance(module, (Linear, Conv1D)) and module is not head
        }
    )
    if target == "all":
        return known
    names = list(dict.fromkeys(name.strip() for name in target.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise BadInput(
                f"train.lora_target: {type(network).__name__} has no linear layer {name!r}{did_you_mean(name, known)}",
                f"use all, or some of: {', '.join(known)}",
            )
    if not names:
        raise BadInput("train.lora_target is empty", f"use all, or some of: {', '.join(known)}")
    return names
