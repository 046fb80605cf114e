"""Section `train`, whose keys have LLaMA-Factory's names and meanings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from finetune_assets.recipe.sections.section import LARGEST, Section

# YAML 1.1 reads an unquoted `no` as false; Hugging Face's strategy names use the word.
Strategy = Annotated[Literal["no", "epoch"], BeforeValidator(lambda value: "no" if value is False else value)]


class TrainSection(Section):
    """How the adapter is trained, by LLaMA-Factory's argument names."""

    stage: Literal["sft"] = Field(default="sft", description="Training stage")
    finetuning_type: Literal["lora"] = Field(default="lora", description="What is trained")
    lora_rank: int = Field(default=8, ge=1)
    lora_alpha: int | None = Field(default=None, ge=1, description="Scale of the update; twice the rank if not given")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_target: str = Field(default="all", description="all (every linear layer), or module names: q_proj,v_proj")
    use_rslora: bool = False
    use_dora: bool = False
    pissa_init: bool = Field(
        default=False,
        description="Start from the weights' principal components; saved as plain LoRA of twice the rank",
    )
    pissa_iter: int = Field(
        default=16, ge=-1, description="Iterations of the fast decomposition for pissa_init; -1: the exact, slow one"
    )
    cutoff_len: int = Field(default=2048, ge=8, description="Longest row, in tokens; longer ones are cut and counted")
    train_on_prompt: bool = Field(default=False, description="Also learn the user's words")
    mask_history: bool = Field(default=False, description="Learn the last answer of a conversation only")
    per_device_train_batch_size: int = Field(default=8, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=5e-5, gt=0)
    num_train_epochs: float = Field(default=3.0, gt=0, le=1_000_000)
    max_steps: int = Field(default=-1, ge=-1, description="Stop after this many optimiser steps; -1: epochs decide")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: float = Field(default=0, ge=0, description="Optimiser steps, or a share of all steps when below 1")
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    optim: Literal["adamw_torch", "adamw_torch_fused", "sgd"] = "adamw_torch"
    bf16: bool | None = Field(default=None, description="Mixed precision; left out: what the device does best")
    fp16: bool | None = Field(default=None, description="Mixed precision; left out: what the device does best")
    disable_gradient_checkpointing: bool = Field(default=False, description="Faster, and more memory")
    group_by_length: bool = Field(default=False, description="Rows of similar length share a batch: less padding")
    disable_shuffling: bool = Field(default=False, description="Train in the order of the files")
    eval_strategy: Strategy = Field(default="epoch", description="When to measure the validation loss")
    logging_steps: int = Field(default=1, ge=1)
    seed: int = Field(default=42, ge=0, lt=LARGEST)

    @model_validator(mode="after")
    def _no_contradictions(self) -> TrainSection:
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 exclude each other")
        if self.train_on_prompt and self.mask_history:
            raise ValueError("train_on_prompt and mask_history exclude each other")
        if self.pissa_init and self.use_dora:
            raise ValueError("pissa_init and use_dora exclude each other")
        if self.disable_shuffling and self.group_by_length:
            raise ValueError("disable_shuffling and group_by_length exclude each other")
        return self
