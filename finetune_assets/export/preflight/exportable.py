"""The check before training that a base model can be merged and converted to GGUF."""

from __future__ import annotations

import hashlib
from pathlib import Path

from finetune_assets.export.gguf.converter import convert_vocabulary, converter_version
from finetune_assets.export.merge.folder import read_json
from finetune_assets.export.merge.merge import refuse_quantised
from finetune_assets.reporting.events import Progress, message


def check_exportable(
    base: Path,
    identity: str,
    cache: Path,
    progress: Progress,
    *,
    trust_remote_code: bool = False,
) -> Path:
    """Prove that what is trained on `base` can be merged into it, and converted to GGUF.

    Seconds for a base that this converter has not seen, milliseconds afterwards: the file stays in `cache`.

    Args:
        base: Hugging Face folder.
        identity: the data version of its content.
        trust_remote_code: let the converter run the code that comes with the base.

    Returns:
        A GGUF file of the base's vocabulary, without weights.

    Raises:
        BadInput: the base is quantised.
        StepFailed: the converter cannot be downloaded, does not know the architecture or tokenizer, or failed
            otherwise; the base needs its own code.
    """
    refuse_quantised(read_json(base / "config.json"), base)
    question = f"{identity} {converter_version()} {trust_remote_code=}"
    vocabulary = cache / "vocabularies" / f"{hashlib.sha256(question.encode()).hexdigest()[:32]}.gguf"
    if vocabulary.is_file():
        return vocabulary
    progress(message("asking llama.cpp's converter whether it knows the base model"))
    convert_vocabulary(base, vocabulary, cache, trust_remote_code=trust_remote_code)
    return vocabulary
