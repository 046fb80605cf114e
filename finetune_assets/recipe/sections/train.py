"""Section `train`, whose keys have LLaMA-Factory's names and meanings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from finetune_assets.recipe.sections.section import LARGEST, Section

# YAML 1.1 reads an unquoted `no` as false; Hugging Face's strategy names use the word.
Strategy = Annotated[Literal["no", "epoch"], BeforeValidator(lambda value: "no" if value is False else value)]


class TrainSection(Section):
    """How the adapter is trained; the keys have the names of LLaMA-Factory's arguments."""

    stage: Literal["sft"] = Field(default="sft", description="Training stage; sft is supervised fine-tuning.")
    finetuning_type: Literal["lora"] = Field(
        default="lora", description="Fine-tuning method; lora trains low-rank adapters."
    )
    lora_rank: int = Field(default=8, ge=1, description="Rank of the LoRA matrices. No unit.")
    lora_alpha: int | None = Field(
        default=None, ge=1, description="Scale factor of the LoRA update; without it, twice lora_rank. No unit."
    )
    lora_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout probability of the LoRA layers. Unit: share of the activations."
    )
    lora_target: str = Field(
        default="all", description="Modules that get LoRA layers: all (every linear layer), or names: q_proj,v_proj."
    )
    use_rslora: bool = Field(
        default=False, description="Scale the LoRA update by lora_alpha / sqrt(lora_rank) (rank-stabilised LoRA)."
    )
    use_dora: bool = Field(default=False, description="Use weight-decomposed LoRA (DoRA).")
    pissa_init: bool = Field(
        default=False,
        description="Initialise the LoRA matrices with the principal components of the weights (PiSSA); "
        "the result is saved as plain LoRA of twice the rank.",
    )
    pissa_iter: int = Field(
        default=16,
        ge=-1,
        description="Iterations of the fast SVD of pissa_init; -1: the exact SVD, which is slow. Unit: iterations.",
    )
    cutoff_len: int = Field(
        default=2048, ge=8, description="Length at which rows are cut; the run reports how many. Unit: tokens."
    )
    train_on_prompt: bool = Field(default=False, description="Compute the loss on the prompt as well.")
    mask_history: bool = Field(
        default=False, description="Compute the loss on the last answer of each conversation only."
    )
    per_device_train_batch_size: int = Field(default=8, ge=1, description="Batch size on each device. Unit: rows.")
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="Batches whose gradients are added up before an optimiser step. Unit: batches."
    )
    learning_rate: float = Field(
        default=5e-5, gt=0, description="Highest learning rate, reached after the warm-up. No unit."
    )
    num_train_epochs: float = Field(
        default=3.0, gt=0, le=1_000_000, description="Passes over the training rows. Unit: epochs."
    )
    max_steps: int = Field(
        default=-1,
        ge=-1,
        description="Optimiser steps after which training stops; -1: num_train_epochs decides. Unit: steps.",
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        default="linear", description="Schedule of the learning rate."
    )
    warmup_steps: float = Field(
        default=0,
        ge=0,
        description="Optimiser steps in which the learning rate rises from 0. Unit: share of all steps below 1, "
        "else steps.",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of the optimiser. No unit.")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Norm to which gradients are clipped; 0: no clipping. No unit."
    )
    optim: Literal["adamw_torch", "adamw_torch_fused", "sgd"] = Field(
        default="adamw_torch", description="Optimiser, by its name in transformers."
    )
    bf16: bool | None = Field(default=None, description="Use bf16 mixed precision; without it, the device decides.")
    fp16: bool | None = Field(default=None, description="Use fp16 mixed precision; without it, the device decides.")
    disable_gradient_checkpointing: bool = Field(
        default=False, description="Keep all activations in memory: faster, but needs more memory."
    )
    group_by_length: bool = Field(
        default=False, description="Put rows of similar length into the same batch, to have less padding."
    )
    disable_shuffling: bool = Field(default=False, description="Train on the rows in the order of the files.")
    eval_strategy: Strategy = Field(
        default="epoch", description="When to measure the loss of the validation split: after each epoch, or never."
    )
    logging_steps: int = Field(default=1, ge=1, description="Interval between logged losses. Unit: optimiser steps.")
    seed: int = Field(
        default=42,
        ge=0,
        lt=LARGEST,
        description="Seed of the LoRA initialisation, the dropout and the order of rows. No unit.",
    )

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
