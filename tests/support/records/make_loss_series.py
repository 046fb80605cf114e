"""Losses of a tiny model over a few steps, one series a training run; records them in tests/fixtures/loss_series.json.

Record again only when a change is meant to move the numbers: `python -m tests.support.records.make_loss_series`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from finetune_assets.recipe import TrainSection
from finetune_assets.training.stages.by_name import STAGES
from tests.support.training_fixtures import CPU, MODEL, ROWS, tiny_base, write_rows

RECORD = Path(__file__).resolve().parents[2] / "fixtures" / "loss_series.json"
COMMON: dict[str, Any] = {
    "lora_rank": 4,
    "learning_rate": 0.01,
    "max_steps": 8,
    "per_device_train_batch_size": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
}
RUNS: dict[str, dict[str, Any]] = {
    "sft, lora": {"stage": "sft", "finetuning_type": "lora"},
}


def loss_series(changes: dict[str, Any], folder: Path) -> dict[str, list[float]]:
    """Train, and return the loss of each step and the validation losses, in nats per learnt token.

    Args:
        changes: keys of section `train` besides `COMMON`.
        folder: an empty one.
    """
    import torch

    train = TrainSection.model_validate({**COMMON, **changes})
    out = folder / "out"
    out.mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        STAGES[train.stage](
            tiny_base(folder / "base"),
            write_rows(folder / "train.jsonl", ROWS),
            write_rows(folder / "validation.jsonl", ROWS[:2]),
            out,
            train=train,
            model=MODEL,
            device=CPU,
            progress=lambda event: None,
        )
    finally:
        torch.set_num_threads(threads)
    entries = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    return {kind: [entry["loss"] for entry in entries if entry["event"] == kind] for kind in ("step", "validation")}


def main() -> None:
    """Record the series of every run."""
    record = {}
    for name, changes in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            record[name] = loss_series(changes, Path(folder))
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
