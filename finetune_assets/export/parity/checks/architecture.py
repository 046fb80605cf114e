"""Architectures whose weights can be found again in a GGUF file, and the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Callable

from finetune_assets.models.formats.gguf import Head

# Architectures whose tensors the converter renames and stacks, but neither fuses, splits nor pads: all their weights
# can be found again in the file (see `weights`).
PLAIN = {"gemma3", "llama", "qwen2", "qwen3", "qwen3moe", "smollm3"}
TEXT_PART = "language_model."  # in the names of a model that has other parts, too
EXPERT = re.compile(r"\.experts\.(\d+)\.")


def architecture(head: Head) -> str:
    """Return the name that llama.cpp has for the file's architecture."""
    return str(head.get("general.architecture"))


def renamed(head: Head) -> Callable[[str], str | None]:
    """Return the map from Hugging Face tensor names to GGUF's, for `PLAIN` architectures; experts share one."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    blocks = head.get(f"{architecture(head)}.block_count")
    blocks = min(blocks, len(head.tensors)) if isinstance(blocks, int) else 0
    names = get_tensor_name_map(numbers[architecture(head)], blocks)
    suffixes = (".weight", ".bias")
    return lambda name: names.get_name(EXPERT.sub(".experts.", name.replace(TEXT_PART, "")), try_suffixes=suffixes)
