"""PiSSA: the adapter starts as the base's principal components and is saved as a plain LoRA adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from finetune_assets.export.merge.merge import merge
from finetune_assets.machine.device import Device
from finetune_assets.recipe import ModelSection, TrainSection
from finetune_assets.training.stages import sft
from tests.support import export_fixtures
from tests.support.training_fixtures import chat, tiny_base, write_rows

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [chat("Who are you?", "I am Mizan."), chat("你叫什么名字？", "米赞。")]


@pytest.mark.parametrize("changes", [{}, {"pissa_iter": -1}, {"use_rslora": True}], ids=["fast", "exact", "rslora"])
def test_what_was_trained_is_what_is_saved_and_merged(tmp_path: Path, cpu: Device, changes: dict[str, Any]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, out = tiny_base(tmp_path / "base"), tmp_path / "adapter"
    out.mkdir()
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    trained: list[Any] = []
    save = sft.save_adapter
    ids = torch.arange(5, 40).unsqueeze(0)

    def says(model: Any) -> Any:
        with torch.no_grad():
            return model.eval()(ids).logits

    with pytest.MonkeyPatch.context() as patch:
        # what the model in training says in its last moment
        patch.setattr(sft, "save_adapter", lambda network, *rest: (trained.append(says(network)), save(network, *rest)))
        section = {
            "pissa_init": True,
            "lora_rank": 4,
            "max_steps": 6,
            "learning_rate": 5e-3,
            "cutoff_len": 64,
        } | changes
        sft.train(
            base,
            rows,
            None,
            out,
            train=TrainSection.model_validate(section | changes),
            model=ModelSection(model_name_or_path="org/tiny"),
            device=cpu,
            progress=lambda event: None,
        )
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 8 and config["init_lora_weights"] is True
    assert not (out / "initial").exists()
    plain = AutoModelForCausalLM.from_pretrained(base)
    untuned = says(plain)
    tuned = says(PeftModel.from_pretrained(plain, str(out)))
    assert (untuned - trained[0]).abs().max() > 0.1, "it has learnt something"
    torch.testing.assert_close(tuned, trained[0], rtol=1e-4, atol=1e-4)
    report = merge(base, out, tmp_path / "merged", export_size=5, export_dtype="auto")
    assert report["method"] == "streamed"
    torch.testing.assert_close(
        says(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), trained[0], rtol=1e-4, atol=1e-4
    )


def test_the_merge_of_a_converted_adapter_is_peft_s_own(tmp_path: Path) -> None:
    """Residual + adapter, merged by PEFT, against base + converted adapter, merged by us."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = export_fixtures.tiny_base(tmp_path / "base", tied=False)
    network = AutoModelForCausalLM.from_pretrained(base)
    model: Any = get_peft_model(
        network, LoraConfig(r=4, init_lora_weights="pissa", target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "initial")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.05
    converted = tmp_path / "adapter"
    model.save_pretrained(converted, path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    merge(base, converted, tmp_path / "merged", export_size=5, export_dtype="auto")
    ours, theirs = load_file(tmp_path / "merged" / "model.safetensors"), model.merge_and_unload().state_dict()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6)


def test_a_magnitude_cannot_be_subtracted() -> None:
    with pytest.raises(ValidationError, match="pissa_init and use_dora exclude each other"):
        TrainSection(pissa_init=True, use_dora=True)
