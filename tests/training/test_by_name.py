"""Every stage and method that a recipe may name is in its table."""

from __future__ import annotations

from typing import get_args

import pytest

from finetune_assets.recipe import TrainSection
from finetune_assets.training.methods.by_name import METHODS
from finetune_assets.training.stages.by_name import STAGES

pytestmark = pytest.mark.fast


def allowed(key: str) -> set[str]:
    return set(get_args(TrainSection.model_fields[key].annotation))


def test_the_tables_hold_what_recipes_may_name() -> None:
    assert set(STAGES) == allowed("stage")
    assert set(METHODS) == allowed("finetuning_type")
