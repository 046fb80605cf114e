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
    """Write the adapter, tokenizer, chat settings, log and curve; no file depends on the machine or the time.

    Args:
        initial: folder of the untrained adapter, if it began with principal components of the base's weights (PiSSA).
            The difference of the two is written: a plain adapter of the unchanged base.

    Raises:
        StepFailed: a trained weight is not finite.
    """
    import torch

    for name, weight in network.named_parameters():
        if weight.requires_grad and not torch.isfinite(weight).all():
            raise StepFailed(f"the trained weights are not finite ({name})", "lower train.learning_rate")
    network.peft_config["default"].base_model_name_or_path = model.model_name_or_path
    network.save_pretrained(
        str(out),
        save_embedding_layers=False,  # "auto" would query the Hub about the vocabulary
        path_initial_model_for_weight_conversion=str(initial) if initial is not None else None,
    )
    if initial is not None:
        shutil.rmtree(initial)
    (out / "README.md").unlink(missing_ok=True)  # PEFT's model card is an empty template
    config = out / "adapter_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["target_modules"] = sorted(settings["target_modules"])  # a set, whose order differs between runs
    _write_json(config, settings)
    tokenizer.save_pretrained(out)
    _write_json(out / "chat.json", chat_settings(tokenizer, model.default_system))
    with (out / "training_log.jsonl").open("w", encoding="utf-8", newline="\n") as lines:
        lines.writelines(json.dumps(entry.as_json()) + "\n" for entry in log.entries)
    curve.draw(out / "loss.png", log.losses, log.validation_losses)


def _write_json(path: Path, value: object) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")
