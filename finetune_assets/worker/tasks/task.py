"""The base of every task for a worker process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel

from finetune_assets.machine.device import Device, choose_device
from finetune_assets.recipe import ModelSection
from finetune_assets.reporting.events import Progress


class Task(BaseModel, frozen=True):
    """Work for a separate process, which reads its JSON form from a pipe.

    Attributes:
        less_memory: the hint for a worker that the system killed when memory ran out.
        task: the name that tells the classes apart in JSON.
        out: the folder that the task writes to.
        device: auto, cuda, mps or cpu.
    """

    less_memory: ClassVar[str] = "close other programs"

    task: str
    out: Path
    model: ModelSection
    device: str = "auto"

    def run(self, progress: Progress) -> dict[str, Any]:
        """Do the work in this process; return its report as a JSON object."""
        raise NotImplementedError

    def choose_device(self, *, bf16: bool | None = False, fp16: bool | None = False) -> Device:
        """Return the device to compute on."""
        return choose_device(bf16, fp16, self.device)
