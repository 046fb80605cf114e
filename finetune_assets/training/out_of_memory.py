"""Out-of-memory errors of training, turned into failures that say which settings need less memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

from finetune_assets.machine.device import Device
from finetune_assets.recipe import TrainSection
from finetune_assets.reporting.errors import StepFailed


@contextmanager
def explain_out_of_memory(train: TrainSection, device: Device) -> Iterator[None]:
    """Turn an out-of-memory error inside the context into a StepFailed that says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if _is_out_of_memory(error):
            raise _explanation(train, device, error) from error
        raise


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; on the CPU, PyTorch raises a RuntimeError that only its text tells apart."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return bool(re.search(r"out of memory|can't allocate memory|not enough memory", str(error), re.IGNORECASE))


def _explanation(train: TrainSection, device: Device, error: BaseException) -> StepFailed:
    batch, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    remedies = []
    if batch > 1:
        remedies.append(
            f"set train.per_device_train_batch_size: {batch // 2} and train.gradient_accumulation_steps: "
            f"{math.ceil(accumulation * batch / (batch // 2))} (the same rows per optimiser step)"
        )
    if train.disable_gradient_checkpointing:
        remedies.append("set train.disable_gradient_checkpointing: false (slower, much less memory)")
    remedies.append(f"lower train.cutoff_len (now {train.cutoff_len}), or use a smaller base model")
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return StepFailed(
        f"out of memory on {device.name} ({device.memory_gib:.1f} GiB) with batches of {batch} rows: {first}",
        "; or ".join(remedies),
    )
