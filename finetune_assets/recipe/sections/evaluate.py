"""Section `evaluate`."""

from __future__ import annotations

from pydantic import Field

from finetune_assets.recipe.sections.section import Section


class EvaluateSection(Section):
    """How the base model and the tuned model are scored on the test split."""

    max_samples: int | None = Field(
        default=None, ge=1, description="Most test rows for which answers are generated; without it, all. Unit: rows."
    )
    max_new_tokens: int = Field(default=128, ge=1, description="Length at which a generated answer ends. Unit: tokens.")
    per_device_eval_batch_size: int = Field(default=8, ge=1, description="Batch size on each device. Unit: rows.")
