"""Folder of a trained adapter: its weights and everything needed to use them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_assets.chat.template import chat_settings
from finetune_assets.recipe import ModelSection
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.training.monitor import curve
from finetune_assets.training.monitor.log import Log

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def save_adapter(
    network: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    initial: Path | None,
    model: ModelSection,
    log: Log,
) -> None:
    """Write the adapter and what belongs to it; nothing in it names this machine or this moment.

    Args:
        initial: where the adapter lies as it was before training, if it began with a part of the base's weights. What
            is written is the difference of the two, a plain adapter of the base as it was.
    """
    import torch

    for name, weight in network.named_parameters():
        if weight.requires_grad and not torch.isfinite(weight).all():
            raise StepFailed(f"the trained weights are not finite ({name})", "lower train.learning_rate")
    network.peft_config["default"].base_model_name_or_path = model.model_name_or_path
    network.save_pretrained(
        str(out),
        save_embedding_layers=False,  # "auto" would ask the Hub about the vocabulary
        path_initial_model_for_weight_conversion=str(initial) if initial is not None else None,
    )
    if initial is not None:
        shutil.rmtree(initial)
    (out / "README.md").unlink(missing_ok=True)  # PEFT's model card: an empty form
    config = out / "adapter_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["target_modules"] = sorted(settings["target_modules"])  # a set: its order differs from run to run
    _write_json(config, settings)
    tokenizer.save_pretrained(out)
    _write_json(out / "chat.json", chat_settings(tokenizer, model.default_system))
    with (out / "training_log.jsonl").open("w", encoding="utf-8", newline="\n") as lines:
        lines.writelines(json.dumps(entry.as_json()) + "\n" for entry in log.entries)
    curve.draw(out / "loss.png", log.losses, log.validation_losses)


def _write_json(path: Path, value: object) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")
