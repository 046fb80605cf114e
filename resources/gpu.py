"""The device that training and evaluation run on."""

from __future__ import annotations

from typing import Literal

import dagster as dg

from finetune_assets.device import Device, choose_device


class GpuResource(dg.ConfigurableResource):
    """Chooses device and precision: CUDA with bf16 or fp16, Apple's MPS, or the CPU."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"

    def choose(self, bf16: bool | None = None, fp16: bool | None = None) -> Device:
        """The device and the precision to use on it, its name and its memory in GiB.

        Raises:
            StepFailed: the device is not there, or cannot compute in the precision that was asked for.
        """
        return choose_device(bf16, fp16, self.device)
