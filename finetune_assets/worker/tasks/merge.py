"""The task that merges an adapter into its base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from finetune_assets.recipe import ExportSection
from finetune_assets.reporting.events import Progress
from finetune_assets.worker.tasks.task import Task


class Merge(Task, frozen=True):
    """Merge of an adapter into its base model, and the comparison of the result with both.

    Attributes:
        held_out: file of the held-out rows for the comparison.
    """

    less_memory: ClassVar[str] = "the model must fit into memory in the precision of its weights"

    task: Literal["merge"] = "merge"
    base: Path
    adapter: Path
    held_out: Path
    export: ExportSection

    def run(self, progress: Progress) -> dict[str, Any]:
        """Merge and compare; return the report of the merge, with the comparison's report under `check`."""
        from finetune_assets.export.merge.merge import merge
        from finetune_assets.export.parity.merged import check

        device, trust = self.choose_device(), self.model.trust_remote_code
        report = merge(
            self.base,
            self.adapter,
            self.out,
            export_size=self.export.export_size,
            export_dtype=self.export.export_dtype,
            device="cpu" if self.export.export_device == "cpu" else device.kind,
            trust_remote_code=trust,
            progress=progress,
        )
        checked = check(
            self.base, self.adapter, self.out, self.held_out, device, trust_remote_code=trust, progress=progress
        )
        return {**report, "check": checked}
