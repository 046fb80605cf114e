"""The device that training and evaluation run on, and one computation at a time on it."""

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
    """One device, held.

    Args:
        environment: for the process that computes: it sees this device only.
        lock: the file descriptor that holds the lock. Inherited by a child, it holds as long as that lives.
    """

    environment: Mapping[str, str]
    lock: int


class GpuResource(dg.ConfigurableResource):
    """Where to compute: CUDA with bf16 or fp16, Apple's MPS, or the CPU; auto takes the first that is there."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"

    @contextmanager
    def lease(self, progress: Progress) -> Iterator[Lease]:
        """Hold one device of this machine while the context is open; wait while every one is taken.

        Dagster's pool counts its own runs only. This lock also keeps out the command line, other instances and other
        checkouts of the same user, and lapses with the processes that hold it.

        Args:
            progress: told once for whom it waits.
        """
        folder, there = lock_folder(), devices(self.device)
        told = False
        while True:
            for name, environment in there.items():
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
            if not told:
                told = True
                taken = " or ".join(_held(folder, name) for name in there)
                progress(message(f"waits for {taken}"))
            time.sleep(POLL_SECONDS)


def devices(wanted: str) -> dict[str, dict[str, str]]:
    """What can be leased here: name -> the environment that shows a process this device only. Does not load torch."""
    if wanted in ("auto", "cuda"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            numbers = sorted(int(path.name[len("nvidia") :]) for path in Path("/dev").glob("nvidia[0-9]*"))
            found = [str(number) for number in numbers]
        else:
            found = [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]
        if found:
            return {f"cuda-{name.replace('/', '_')}": {"CUDA_VISIBLE_DEVICES": name} for name in found}
    return {"cpu" if wanted == "cpu" else "device": {}}


def lock_folder() -> Path:
    """Where the locks of this machine's devices lie: one folder a user, whatever session the process belongs to.

    Raises:
        StepFailed: the folder is somebody else's.
    """
    folder = Path(tempfile.gettempdir()) / f"finetune-assets-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise StepFailed(f"{folder} belongs to another user", "remove it, or set TMPDIR to a folder of your own")
    return folder


def _held(folder: Path, name: str) -> str:
    holder = (folder / f"{name}.lock").read_text()
    return f"the {name} (held by process {holder})" if holder.isdigit() else f"the {name}"
