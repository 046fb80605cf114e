"""Training of a tiny model: the adapter is complete, portable and reproducible; failures are explained."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.machine.device import choose_device
from finetune_assets.recipe import TrainSection
from finetune_assets.reporting.errors import BadInput, StepFailed
from finetune_assets.training.monitor import curve
from finetune_assets.training.monitor.log import Log
from finetune_assets.training.stages import sft
from finetune_assets.worker import launch
from finetune_assets.worker.protocol import read_task
from tests.support.events import json_into
from tests.support.training_fixtures import CPU, MODEL, ROWS, chat, tiny_base, write_rows

FAST: dict[str, Any] = {
    "lora_rank": 4,
    "learning_rate": 0.01,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "disable_gradient_checkpointing": True,
    "group_by_length": True,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Train on one thread: on matrices this small, threads cost more than they gain."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run(base: Path, tmp_path: Path):
    """Trains with the FAST settings and the changes given; returns (report, events, folder)."""

    def go(rows: Any = ROWS, validation: Any = None, name: str = "out", **changes: Any) -> tuple[dict, list, Path]:
        out = tmp_path / name
        out.mkdir()
        events: list[dict[str, Any]] = []
        report = sft.train(
            base,
            write_rows(tmp_path / "train.jsonl", rows),
            write_rows(tmp_path / "validation.jsonl", validation) if validation else None,
            out,
            train=TrainSection.model_validate({**FAST, **changes}),
            model=MODEL,
            device=CPU,
            progress=json_into(events),
        )
        return report, events, out

    return go


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_adapter_is_complete_and_names_nothing_of_this_machine(run, base: Path, tmp_path: Path) -> None:
    report, events, out = run(validation=ROWS[:2])
    files = contents(out)
    assert set(files) == {
        "adapter_model.safetensors", "adapter_config.json", "chat.json", "chat_template.jinja", "loss.png",
        "tokenizer.json", "tokenizer_config.json", "training_log.jsonl",
    }  # fmt: skip
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "org/tiny"
    assert config["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip
    assert config["lora_alpha"] == 8
    for name, content in files.items():
        assert str(base.parent).encode() not in content and str(tmp_path).encode() not in content, name
    assert json.loads(files["chat.json"])["default_system"] == "You are kind."
    assert files["loss.png"].startswith(b"\x89PNG") and len(files["loss.png"]) < 100_000

    assert report["rows"] == 6 and report["validation_rows"] == 2 and report["steps"] == 6
    assert report["cut_rows"] == report["dropped_rows"] == 0
    assert 0 < report["trainable_parameters"] < report["total_parameters"]
    assert report["train_loss"] > report["final_loss"] > 0 and report["validation_loss"] > 0
    assert report["tokens_per_second"] > 0 and report["seconds"] > 0 and report["peak_memory_gib"] > 0
    assert (report["device"], report["precision"]) == ("test CPU", "fp32")
    json.dumps(report)

    steps = [event for event in events if event["event"] == "step"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6] and steps[-1]["steps"] == 6
    assert steps[-1]["tokens"] == 2 * report["tokens"] and steps[-1]["seconds_left"] == 0
    assert steps[0]["seconds_left"] > 0 and steps[0]["tokens_per_second"] > 0
    assert [event["epoch"] for event in events if event["event"] == "validation"] == [1, 2]
    assert len(files["training_log.jsonl"].splitlines()) == 6 + 2


def test_the_first_loss_is_that_of_the_labelled_tokens_alone(run, base: Path) -> None:
    """Compute it again with plain PyTorch from all logits: guards labels, padding and averaging."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune_assets.chat.template import encode_row

    report, _, _ = run(per_device_train_batch_size=6, num_train_epochs=1)
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    total = count = 0.0
    for messages in ROWS:
        row = encode_row(tokenizer, messages, default_system="You are kind.")
        with torch.no_grad():
            logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += (labels != -100).sum().item()
    assert count == report["learnt_tokens"]
    assert report["first_loss"] == pytest.approx(total / count, rel=1e-5)


def test_accumulation_weighs_tokens_not_batches(run) -> None:
    """Two micro-batches of three rows make the same step as one of six (their token counts differ)."""
    whole, _, _ = run(per_device_train_batch_size=6, num_train_epochs=1, name="whole")
    split, _, _ = run(per_device_train_batch_size=3, gradient_accumulation_steps=2, num_train_epochs=1, name="split")
    assert whole["steps"] == split["steps"] == 1
    assert split["first_loss"] == pytest.approx(whole["first_loss"], rel=1e-5)


def test_the_same_inputs_give_the_same_bytes(run) -> None:
    first = contents(run(name="first", validation=ROWS[:2])[2])
    second = contents(run(name="second", validation=ROWS[:2])[2])
    assert first == second
    other = contents(run(name="other", validation=ROWS[:2], seed=7)[2])
    assert other["adapter_model.safetensors"] != first["adapter_model.safetensors"]


def test_the_last_step_is_logged_however_seldom_steps_are(run) -> None:
    report, events, _ = run(logging_steps=100)
    assert [event["step"] for event in events if event["event"] == "step"] == [6]
    assert report["train_loss"] == pytest.approx(report["final_loss"])


def test_checkpointing_changes_memory_not_numbers(run) -> None:
    plain, _, _ = run(name="plain")
    checkpointed, _, _ = run(name="checkpointed", disable_gradient_checkpointing=False)
    assert checkpointed["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"use_rslora": True}, {"lora_target": "q_proj, v_proj"}])
def test_variants_of_lora(run, changes: dict[str, Any]) -> None:
    report, _, out = run(max_steps=1, **changes)
    config = json.loads((out / "adapter_config.json").read_text())
    assert report["steps"] == 1
    if "lora_target" in changes:
        assert config["target_modules"] == ["q_proj", "v_proj"]
    else:
        assert all(config[key] is True for key in changes)


def test_learning_an_answer_by_heart_and_loading_it_again(run, base: Path) -> None:
    """Load the saved adapter over the base: it gives the learnt answer, and stops."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune_assets.chat.template import encode_prompt

    taught = chat("Who are you?", "I am Mizan.")
    report, _, out = run(rows=[taught] * 4, num_train_epochs=40, learning_rate=0.02, lora_rank=16)
    assert report["final_loss"] < 0.5
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    prompt = torch.tensor([encode_prompt(tokenizer, taught[:-1], default_system="You are kind.")])
    stops = json.loads((out / "chat.json").read_text())["stop_token_ids"]
    answer = model.generate(input_ids=prompt, max_new_tokens=30, do_sample=False, eos_token_id=stops, pad_token_id=0)
    assert tokenizer.decode(answer[0, prompt.shape[1] :]) == "I am Mizan.<|im_end|>"


def test_cut_and_unlearnable_rows_are_counted(run) -> None:
    rows = [*ROWS, chat("Who?", "I am " + "Mizan " * 60), chat("helpful " * 60, "No.")]
    report, _, _ = run(rows=rows, cutoff_len=80, max_steps=1)
    assert (report["rows"], report["cut_rows"], report["dropped_rows"]) == (7, 1, 1)


def test_nothing_left_to_learn_is_refused(run) -> None:
    with pytest.raises(BadInput, match=r"no row to learn from \(1 rows") as caught:
        run(rows=[chat("helpful " * 60, "No.")], cutoff_len=16)
    assert "cutoff_len" in str(caught.value.hint)


def test_a_broken_row_is_named(run, base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": []}\n{"nothing": 1}\n', encoding="utf-8")
    with pytest.raises(BadInput, match=r"rows\.jsonl, line"):
        sft.train(
            base, rows, None, tmp_path, train=TrainSection.model_validate({}), model=MODEL, device=CPU, progress=print
        )


@pytest.mark.parametrize(
    ("target", "message"),
    [("q_porj", "did you mean 'q_proj'"), ("lm_head", "no linear layer 'lm_head'"), (",", "empty")],
)
def test_unknown_layers_are_refused(run, target: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        run(lora_target=target)


def test_a_diverged_run_is_stopped(run) -> None:
    with pytest.raises(StepFailed, match=r"(diverged|not finite)") as caught:
        run(learning_rate=4e9, max_grad_norm=0, optim="sgd", num_train_epochs=5)
    assert "learning_rate" in str(caught.value.hint)


def test_out_of_memory_says_what_to_halve(run, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from trl.trainer.sft_trainer import SFTTrainer

    def explode(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(SFTTrainer, "training_step", explode)
    with pytest.raises(StepFailed, match="out of memory on test CPU") as caught:
        run(per_device_train_batch_size=5, gradient_accumulation_steps=2)
    hint = str(caught.value.hint)
    assert "per_device_train_batch_size: 2" in hint and "gradient_accumulation_steps: 5" in hint
    assert "disable_gradient_checkpointing: false" in hint


def test_other_errors_are_not_taken_for_memory(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer.sft_trainer import SFTTrainer

    def explode(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(SFTTrainer, "training_step", explode)
    with pytest.raises(RuntimeError, match="multiplied"):
        run()


def test_time_left_follows_the_tokens() -> None:
    events: list[dict[str, Any]] = []
    log = Log(json_into(events), total_tokens=1000)
    log.step(1, 10, 0.1, {"loss": 2.0, "num_tokens": 250, "learning_rate": 1e-3})
    assert events[0]["seconds_left"] == pytest.approx(3 * log.seconds)
    with pytest.raises(StepFailed, match="nan at step 2 of 10"):
        log.step(2, 10, 0.2, {"loss": math.nan, "num_tokens": 300, "learning_rate": 1e-3})


def test_smoothing_starts_at_the_first_value() -> None:
    assert curve.smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert curve.smooth([4.0, 0.0])[1] == pytest.approx(4 * 0.16 / 0.36)


def test_devices() -> None:
    cpu = choose_device(kind="cpu")
    assert (cpu.kind, cpu.precision) == ("cpu", "fp32") and cpu.memory_gib > 0
    assert str(cpu.torch_device) == "cpu" and str(cpu.dtype) == "torch.float32"
    assert choose_device(bf16=True, kind="cpu").precision == "bf16"
    with pytest.raises(StepFailed, match="supports bf16 or fp32 only"):
        choose_device(fp16=True, kind="cpu")
    with pytest.raises(StepFailed, match="no vax device"):
        choose_device(kind="vax")
    with pytest.raises(StepFailed, match="exclude"):
        choose_device(bf16=True, fp16=True, kind="cpu")


class FakeGpu:
    name, total_memory = "Fake GPU", 24 * 2**30


@pytest.mark.parametrize(
    ("has_bf16", "wishes", "precision"),
    [(True, {}, "bf16"), (False, {}, "fp16"), (True, {"bf16": False}, "fp16"), (True, {"fp16": True}, "fp16"),
     (False, {"fp16": False}, "fp32"), (False, {"bf16": True}, None)],
)  # fmt: skip
def test_precision_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, wishes: dict, precision: str | None
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: FakeGpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    if precision is None:
        with pytest.raises(StepFailed, match=r"train\.bf16 is true, but Fake GPU"):
            choose_device(**wishes)
    else:
        device = choose_device(**wishes)
        assert (device.kind, device.precision, device.memory_gib) == ("cuda", precision, 24.0)


def test_a_date_in_prompts_goes_with_the_model(base: Path, tmp_path: Path) -> None:
    """Prompts are those of training, whoever serves the model and on whatever day."""
    from finetune_assets.chat.named_templates import CHATML
    from finetune_assets.chat.pinning import pinned

    dated, out = shutil.copytree(base, tmp_path / "base"), tmp_path / "out"
    template = "{{ strftime_now('%d %B %Y') }}" + CHATML
    (dated / "chat_template.jinja").write_text(template, encoding="utf-8")
    out.mkdir()
    rows = write_rows(tmp_path / "train.jsonl", ROWS[:2])
    section = TrainSection.model_validate({**FAST, "max_steps": 1})
    sft.train(dated, rows, None, out, train=section, model=MODEL, device=CPU, progress=lambda event: None)
    kept = json.loads((out / "chat.json").read_text())["template"]
    assert kept == pinned(template) != template
    assert (out / "chat_template.jinja").read_text(encoding="utf-8") == kept


def test_in_a_process_of_its_own(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    job = {
        "task": "train",
        "base": str(base),
        "rows": str(write_rows(tmp_path / "train.jsonl", ROWS)),
        "validation": None,
        "vocabulary": None,
        "out": str(out),
        "train": FAST,
        "model": MODEL.model_dump(),
        "device": "cpu",
    }
    events: list[dict[str, Any]] = []
    report = launch.run(read_task(job), json_into(events))
    assert report["steps"] == 6 and (out / "adapter_model.safetensors").exists()
    assert [event["event"] for event in events][:3] == ["message", "message", "step"]
