"""Losses of a tiny model in training, compared with the recorded ones: a change of the arithmetic fails here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.records.make_loss_series import RECORD, RUNS, loss_series

TOLERANCE = 1e-4  # relative: versions of torch add in different orders


def recorded(name: str) -> dict[str, list[float]]:
    return json.loads(RECORD.read_text(encoding="utf-8"))[name]


def agrees(series: dict[str, list[float]], record: dict[str, list[float]]) -> bool:
    return series.keys() == record.keys() and all(
        series[kind] == pytest.approx(record[kind], rel=TOLERANCE) for kind in record
    )


@pytest.mark.parametrize("name", RUNS)
def test_the_losses_are_those_on_record(name: str, tmp_path: Path) -> None:
    series, record = loss_series(RUNS[name], tmp_path), recorded(name)
    assert len(series["step"]) == 8 and series["step"][-1] < series["step"][0]
    assert series["step"] == pytest.approx(record["step"], rel=TOLERANCE)
    assert series["validation"] == pytest.approx(record["validation"], rel=TOLERANCE)


@pytest.mark.parametrize(
    "change", [{"lora_alpha": 9}, {"train_on_prompt": True}, {"seed": 43}, {"warmup_steps": 3}], ids=str
)
def test_a_setting_that_changes_training_changes_the_losses(change: dict[str, Any], tmp_path: Path) -> None:
    """Guards the test above: it must fail when a setting changes the arithmetic."""
    assert not agrees(loss_series({**RUNS["sft, lora"], **change}, tmp_path), recorded("sft, lora"))
