"""The task that compares GGUF files with their merged model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

from finetune_assets.export.parity.limits import Figures
from finetune_assets.reporting.events import Progress
from finetune_assets.worker.tasks.task import Task


class Prove(Task, frozen=True):
    """Proof that GGUF files agree with the merged model, within the limits of their types.

    Attributes:
        held_out: file of the held-out rows for the comparison.
        files: GGUF type -> file.
        max_kl: GGUF type -> limit of its mean KL divergence, in nats per token, where the recipe sets one.
        recorded: GGUF type -> earlier figures of a file that has not changed.
        written: GGUF type -> sha256 (hex) of the file when it was written.
    """

    less_memory: ClassVar[str] = "list fewer or smaller types in gguf.types"

    task: Literal["prove"] = "prove"
    merged: Path
    held_out: Path
    files: dict[str, Path]
    max_kl: dict[str, float]
    recorded: dict[str, Figures]
    written: dict[str, str]

    def run(self, progress: Progress) -> dict[str, Any]:
        """Run every check; return the figures of each type."""
        from finetune_assets.export.parity.prove import prove

        figures = prove(
            self.files,
            self.merged,
            self.held_out,
            device=self.choose_device,
            max_kl=self.max_kl,
            recorded=self.recorded,
            written=self.written,
            trust_remote_code=self.model.trust_remote_code,
            progress=progress,
        )
        return {"figures": {kind: dataclasses.asdict(measured) for kind, measured in figures.items()}}
