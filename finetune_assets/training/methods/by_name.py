"""Table of training methods: the value of `train.finetuning_type` -> what configures it. Add a method here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from finetune_assets.recipe import TrainSection
from finetune_assets.training.methods.lora import lora_config

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

    Method = Callable[[TrainSection, PreTrainedModel], PeftConfig]

METHODS: Mapping[str, Method] = {"lora": lora_config}
