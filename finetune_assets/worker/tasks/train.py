"""The task that trains an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from finetune_assets.recipe import TrainSection
from finetune_assets.reporting.events import Progress, message
from finetune_assets.worker.tasks.task import Task


class Train(Task, frozen=True):
    """Training of an adapter on the train split.

    Attributes:
        rows, validation: files of the splits.
        vocabulary: GGUF file with only the tokenizer, to check how llama.cpp tokenises prompts; None: no check.
    """

    less_memory: ClassVar[str] = (
        "halve train.per_device_train_batch_size and double train.gradient_accumulation_steps; "
        "train.disable_gradient_checkpointing: false needs far less memory"
    )

    task: Literal["train"] = "train"
    base: Path
    rows: Path
    validation: Path | None
    vocabulary: Path | None
    train: TrainSection

    def run(self, progress: Progress) -> dict[str, Any]:
        """Train, and write the adapter; return the figures of the training."""
        from finetune_assets.export.preflight.prompts import rehearse
        from finetune_assets.training.stages.by_name import STAGES

        if self.vocabulary is not None:
            progress(message("checking that llama.cpp tokenises prompts as training does"))
            rehearse(self.vocabulary, self.base, self.rows, self.model)
        return STAGES[self.train.stage](
            self.base,
            self.rows,
            self.validation,
            self.out,
            train=self.train,
            model=self.model,
            device=self.choose_device(bf16=self.train.bf16, fp16=self.train.fp16),
            progress=progress,
        )
