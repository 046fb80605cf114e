"""Table of training stages: the value of `train.stage` -> what trains. Add a stage here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from finetune_assets.machine.device import Device
from finetune_assets.recipe import ModelSection, TrainSection
from finetune_assets.reporting.events import Progress
from finetune_assets.training.stages import sft


class Stage(Protocol):
    """A function that trains an adapter; `sft.train` documents the arguments and the report."""

    def __call__(
        self,
        base: Path,
        rows: Path,
        validation: Path | None,
        out: Path,
        *,
        train: TrainSection,
        model: ModelSection,
        device: Device,
        progress: Progress,
    ) -> dict[str, Any]: ...


STAGES: Mapping[str, Stage] = {"sft": sft.train}
