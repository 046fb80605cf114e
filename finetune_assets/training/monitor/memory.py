"""Memory that a training run uses."""

from __future__ import annotations

import resource
import sys

from finetune_assets.machine.device import Device


def peak_memory_gib(device: Device) -> float:
    """Return the peak memory of this process: on cuda that of the accelerator, elsewhere main memory."""
    if device.kind == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux
