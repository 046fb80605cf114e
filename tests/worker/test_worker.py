"""The real worker: it trains and scores in a process of its own just as it does in ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_assets.evaluation.evaluate import evaluate
from finetune_assets.machine.device import choose_device
from finetune_assets.recipe import EvaluateSection, ModelSection, TrainSection
from finetune_assets.reporting.errors import BadInput
from finetune_assets.worker import launch
from finetune_assets.worker.protocol import read_task
from tests.support.events import json_into
from tests.support.training_fixtures import chat, tiny_base, write_rows

TRAIN = TrainSection(max_steps=2, per_device_train_batch_size=2, cutoff_len=64)
EVALUATE = EvaluateSection(max_new_tokens=4)
MODEL = ModelSection(model_name_or_path="org/tiny")


def test_it_trains_and_it_scores(tmp_path: Path) -> None:
    adapter, scores, here = (tmp_path / name for name in ("adapter", "scores", "here"))
    for folder in (adapter, scores, here):
        folder.mkdir()
    base = tiny_base(tmp_path / "base")
    rows = write_rows(tmp_path / "train.jsonl", [chat("Who are you?", "I am Mizan."), chat("你叫什么名字？", "米赞。")])
    test = write_rows(tmp_path / "test.jsonl", [chat("What is your name?", "Mizan.")])
    test.write_text(test.read_text(encoding="utf-8").replace('"id": "0', '"id": "f'), encoding="utf-8")
    shared = {"base": str(base), "rows": str(rows), "train": TRAIN.model_dump(), "model": MODEL.model_dump()}
    events: list[dict[str, Any]] = []

    train = {"task": "train", "out": str(adapter), "validation": None, "vocabulary": None, "device": "cpu"}
    assert launch.run(read_task({**shared, **train}), json_into(events))["steps"] == 2
    assert [event["event"] for event in events] == ["message", "message", "step", "step"]

    files = {"task": "evaluate", "adapter": str(adapter), "test": str(test), "out": str(scores)}
    score = {**files, "evaluate": EVALUATE.model_dump(), "device": "cpu"}
    report = launch.run(read_task({**shared, **score}), json_into(events))
    assert events[-1]["step"] == events[-1]["steps"] == 4

    device = choose_device(kind="cpu")
    ours = evaluate(base, adapter, test, here, evaluate=EVALUATE, device=device, train=rows, cutoff_len=64)
    for name in ("metrics.json", "predictions.jsonl"):
        assert (scores / name).read_bytes() == (here / name).read_bytes()
    assert {**report, **{name: ours[name] for name in ("seconds", "samples_per_second")}} == ours


def test_what_the_user_can_put_right_is_told_as_such(tmp_path: Path) -> None:
    base, rows = tiny_base(tmp_path / "base"), write_rows(tmp_path / "train.jsonl", [chat("Hi", "Ho")])
    section = {**TRAIN.model_dump(), "lora_target": "no_such_layer"}
    job = {
        "task": "train",
        "base": str(base),
        "rows": str(rows),
        "validation": None,
        "vocabulary": None,
        "out": str(tmp_path),
    }
    with pytest.raises(BadInput, match="no_such_layer"):
        launch.run(read_task({**job, "train": section, "model": MODEL.model_dump()}), lambda event: None)
