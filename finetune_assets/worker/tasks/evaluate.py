"""The task that scores the base model and the tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from finetune_assets.recipe import EvaluateSection, TrainSection
from finetune_assets.reporting.events import Progress
from finetune_assets.worker.tasks.task import Task


class Evaluate(Task, frozen=True):
    """Evaluation of the base model and the tuned model on the test split.

    Attributes:
        rows: file of the train split; none of its rows may be in the test split.
        test: file of the test split.
        train: the settings of the adapter's training.
    """

    less_memory: ClassVar[str] = "lower evaluate.per_device_eval_batch_size"

    task: Literal["evaluate"] = "evaluate"
    base: Path
    adapter: Path
    rows: Path
    test: Path
    train: TrainSection
    evaluate: EvaluateSection

    def run(self, progress: Progress) -> dict[str, Any]:
        """Score both models; return the metrics."""
        from finetune_assets.evaluation.evaluate import evaluate

        return evaluate(
            self.base,
            self.adapter,
            self.test,
            self.out,
            evaluate=self.evaluate,
            device=self.choose_device(bf16=self.train.bf16, fp16=self.train.fp16),
            train=self.rows,
            cutoff_len=self.train.cutoff_len,
            trust_remote_code=self.model.trust_remote_code,
            progress=progress,
        )
