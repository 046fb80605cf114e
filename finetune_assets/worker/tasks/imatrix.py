"""The task that measures an importance matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from finetune_assets.reporting.events import Progress
from finetune_assets.worker.tasks.task import Task


class Imatrix(Task, frozen=True):
    """Measurement of an importance matrix.

    Attributes:
        gguf: GGUF file of the merged model in full precision.
        rows: file of the split to measure on.
        file: where to write the matrix.
    """

    less_memory: ClassVar[str] = "the model must fit into memory; or remove gguf.imatrix"

    task: Literal["imatrix"] = "imatrix"
    merged: Path
    gguf: Path
    rows: Path
    file: Path

    def run(self, progress: Progress) -> dict[str, Any]:
        """Measure the matrix and write it; return an empty report."""
        from finetune_assets.export.gguf.imatrix import measure

        measure(
            self.merged,
            self.gguf,
            self.rows,
            self.file,
            self.choose_device(),
            trust_remote_code=self.model.trust_remote_code,
            progress=progress,
        )
        return {}
