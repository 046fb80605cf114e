"""What stands in the way of a base model's export, found before anything is trained on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_assets.export.converter import converter_version, read_vocabulary
from finetune_assets.export.merge import read_json, refuse_quantised


def check_exportable(base: Path, identity: str, cache: Path, progress: Callable[[dict[str, Any]], None]) -> None:
    """Prove that what is trained on `base` can be merged into it, and converted to GGUF.

    Seconds for a base that this converter has not seen, milliseconds afterwards: `cache` remembers which it has.

    Args:
        base: Hugging Face folder.
        identity: the data version of its content.

    Raises:
        BadInput: the base is quantised.
        StepFailed: the converter cannot be had, does not know the architecture or tokenizer, or failed otherwise.
    """
    refuse_quantised(read_json(base / "config.json"), base)
    question = f"{identity} {converter_version()}"
    passed = cache / "convertible" / hashlib.sha256(question.encode()).hexdigest()[:32]
    if passed.is_file():
        return
    progress({"event": "message", "text": "asking llama.cpp's converter whether it knows the base model"})
    read_vocabulary(base, cache)
    passed.parent.mkdir(parents=True, exist_ok=True)
    passed.touch()
