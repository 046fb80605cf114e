"""Device and precision selection."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune_assets.machine.cores import cores
from finetune_assets.reporting.errors import StepFailed

if TYPE_CHECKING:
    import torch

Kind = Literal["cuda", "mps", "cpu"]
Precision = Literal["bf16", "fp16", "fp32"]

DTYPES: dict[Precision, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Device:
    """An accelerator (or the CPU) and the precision to compute in.

    Attributes:
        kind: cuda, mps or cpu.
        precision: of the matrix products; adapters are always kept in fp32.
        name: the vendor's name.
        memory_gib: memory of the accelerator in GiB; main memory for mps and cpu.
    """

    kind: Kind
    precision: Precision
    name: str
    memory_gib: float

    @property
    def dtype(self) -> torch.dtype:
        """Return the torch dtype of `precision`."""
        import torch

        return getattr(torch, DTYPES[self.precision])

    @property
    def torch_device(self) -> torch.device:
        """Return the torch device for tensors."""
        import torch

        return torch.device(self.kind)


def choose_device(bf16: bool | None = None, fp16: bool | None = None, kind: str = "auto") -> Device:
    """Choose the device: an NVIDIA or AMD GPU, else the Apple GPU, else the CPU.

    Args:
        bf16: True requires bfloat16, False excludes it, None leaves it to the device.
        fp16: likewise for float16.
        kind: auto, or one of cuda, mps, cpu.

    Raises:
        StepFailed: the machine has no such device, or the device does not support the required precision.
    """
    import torch

    available: dict[str, bool] = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if kind == "auto":
        kind = next(name for name, usable in available.items() if usable)
    elif not available.get(kind):
        raise StepFailed(
            f"this machine has no {kind} device that PyTorch {torch.__version__} can use",
            f"use auto, or one of: {', '.join(name for name, usable in available.items() if usable)}",
        )
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        can: list[Precision] = ["fp16", "fp32"]
        if torch.cuda.is_bf16_supported(including_emulation=False):
            can.insert(0, "bf16")
        precision = _precision("cuda", properties.name, can, can, bf16, fp16)
        return Device("cuda", precision, properties.name, properties.total_memory / 2**30)
    if kind == "mps":
        modern = torch.backends.mps.is_macos_or_newer(14, 0)
        mps_can: list[Precision] = ["bf16", "fp32"] if modern else ["fp32"]
        name = f"Apple {platform.machine()} GPU"
        return Device("mps", _precision("mps", name, mps_can, ["fp32"], bf16, fp16), name, main_memory_gib())
    name = f"{platform.processor() or platform.machine()} CPU, {cores()} cores"
    # Most CPUs convert bf16 to compute, several times slower than fp32: used on request only.
    return Device("cpu", _precision("cpu", name, ["bf16", "fp32"], ["fp32"], bf16, fp16), name, main_memory_gib())


def _precision(
    kind: Kind, name: str, can: list[Precision], best: list[Precision], bf16: bool | None, fp16: bool | None
) -> Precision:
    """Return the required precision if the device `can`; else the first of `best` that is not excluded."""
    if bf16 and fp16:
        raise StepFailed("bf16 and fp16 are both true, but exclude each other", "set one of them, or neither")
    wishes: dict[Precision, bool | None] = {"bf16": bf16, "fp16": fp16}
    for wish, required in wishes.items():
        if required and wish not in can:
            raise StepFailed(
                f"train.{wish} is true, but {name} ({kind}) supports {' or '.join(can)} only",
                f"remove train.{wish} from the recipe: the device then chooses the precision",
            )
        if required:
            return wish
    return next(precision for precision in best if wishes.get(precision) is not False)


def main_memory_gib() -> float:
    """Return the main memory in GiB that this process may use: the smaller of the machine's and the container's."""
    import psutil

    total = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such file (not Linux, other cgroup version), or "max"
            continue
    return total / 2**30
