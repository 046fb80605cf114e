"""The device that training and evaluation run on, and the lock that allows one computation at a time."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import dagster as dg

from finetune_assets.reporting.errors import StepFailed
from finetune_assets.reporting.events import Progress, message

POOL = "gpu"
"""Dagster's pool: its slots are the GPUs (or the CPU) that Dagster's own runs share."""
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Lease:
    """A device that this process holds.

    Args:
        environment: variables for the process that computes, which then sees only this device.
        lock: the file descriptor that holds the lock. A child that inherits it holds the lock until it ends.
    """

    environment: Mapping[str, str]
    lock: int


class GpuResource(dg.ConfigurableResource):
    """The device to compute on: CUDA with bf16 or fp16, Apple's MPS, or the CPU; auto takes the first available."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"

    @contextmanager
    def lease(self, progress: Progress) -> Iterator[Lease]:
        """Hold one device of this machine while the context is open; wait while all devices are taken.

        Dagster's pool counts only its own runs. This lock also excludes the command line, other instances and other
        checkouts of the same user, and ends with the processes that hold it.

        Args:
            progress: receives one message that names the process it waits for.
        """
        folder, available = lock_folder(), devices(self.device)
        reported = False
        while True:
            for name, environment in available.items():
                with (folder / f"{name}.lock").open("a+") as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue
                    file.truncate(0)
                    file.write(str(os.getpid()))
                    file.flush()
                    yield Lease(environment, file.fileno())
                    return
            if not reported:
                reported = True
                taken = " or ".join(_held(folder, name) for name in available)
                progress(message(f"waits for {taken}"))
            time.sleep(POLL_SECONDS)


def devices(wanted: str) -> dict[str, dict[str, str]]:
    """Return name -> environment of each device to lease: it hides all others from a process. Does not load torch."""
    if wanted in ("auto", "cuda"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            numbers = sorted(int(path.name[len("nvidia") :]) for path in Path("/dev").glob("nvidia[0-9]*"))
            names = [str(number) for number in numbers]
        else:
            names = [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]
        if names:
            return {f"cuda-{name.replace('/', '_')}": {"CUDA_VISIBLE_DEVICES": name} for name in names}
    return {"cpu" if wanted == "cpu" else "device": {}}


def lock_folder() -> Path:
    """Return the folder of this machine's device locks: one for each user, the same in every session.

    Raises:
        StepFailed: the folder belongs to another user.
    """
    folder = Path(tempfile.gettempdir()) / f"finetune-assets-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise StepFailed(f"{folder} belongs to another user", "remove it, or set TMPDIR to your own folder")
    return folder


def _held(folder: Path, name: str) -> str:
    holder = (folder / f"{name}.lock").read_text()
    return f"the {name} (held by process {holder})" if holder.isdigit() else f"the {name}"
