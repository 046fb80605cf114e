"""An adapter that says something else than its base model."""

from __future__ import annotations

import json
from pathlib import Path


def tiny_adapter(base: Path, folder: Path, default_system: str | None = "Be brief.") -> Path:
    """A LoRA adapter with random weights, not zero ones, and the chat settings that training leaves beside it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune_assets.chat.template import chat_settings

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder)
    settings = chat_settings(tokenizer, default_system)
    (folder / "chat.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    return folder
