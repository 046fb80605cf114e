"""Settings of the trainer, from section `train` of the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune_assets.machine.device import Device
from finetune_assets.recipe import TrainSection

if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig


def trainer_arguments(train: TrainSection, device: Device, out: Path, *, evaluate: bool) -> SFTConfig:
    """Return the settings of TRL's SFTTrainer."""
    from trl.trainer.sft_config import SFTConfig

    sampling = "sequential" if train.disable_shuffling else "group_by_length" if train.group_by_length else "random"
    return SFTConfig(
        output_dir=str(out),
        seed=train.seed,
        data_seed=train.seed,
        per_device_train_batch_size=train.per_device_train_batch_size,
        per_device_eval_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        learning_rate=train.learning_rate,
        num_train_epochs=train.num_train_epochs,
        max_steps=train.max_steps,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=train.optim,
        bf16=device.precision == "bf16",
        fp16=device.precision == "fp16",
        use_cpu=device.kind == "cpu",
        gradient_checkpointing=not train.disable_gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        train_sampling_strategy=sampling,
        dataloader_pin_memory=device.kind == "cuda",
        eval_strategy=train.eval_strategy if evaluate else "no",
        prediction_loss_only=True,
        logging_steps=train.logging_steps,
        logging_nan_inf_filter=False,  # a non-finite loss must be seen, not replaced by the mean of the others
        save_strategy="no",
        report_to="none",
        push_to_hub=False,
        disable_tqdm=True,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
