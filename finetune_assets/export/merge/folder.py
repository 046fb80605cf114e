"""Files of a merged model's folder besides its weights: configurations, tokenizer, chat files, licence, model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from finetune_assets.export.merge.plan import ExportDtype
from finetune_assets.inputs.json_text import read_model_json
from finetune_assets.inputs.remote_code import SOURCES, is_code
from finetune_assets.models.formats.model_card import read_card, write_card
from finetune_assets.reporting.errors import BadInput, StepFailed

FROM_BASE = ("config.json", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
FROM_ADAPTER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "*.tiktoken", "chat_template.jinja", "chat.json",
)  # fmt: skip


def copy_files(base: Path, adapter: Path, out: Path, *, trust: bool) -> None:
    """Copy tokenizer and chat files from the adapter (else from the base), and the other files from the base.

    The model's own code is copied if it is trusted. The tokenizer's code lies in the adapter, beside the tokenizer.
    """
    code = (SOURCES,) if trust else ()
    for folder, patterns in ((base, (*FROM_BASE, *FROM_ADAPTER, *code)), (adapter, (*FROM_ADAPTER, *code))):
        for pattern in patterns:
            for file in sorted(folder.glob(pattern)):
                if file.is_file() and (pattern in code or not is_code(file.name)):
                    shutil.copyfile(file, out / file.name)
    write_card(out, read_card(base), "A base model and an adapter, merged. Licence and languages are the base model's.")


def write_configurations(
    config: dict[str, Any], chat: Path, out: Path, *, tied: bool | None, export_dtype: ExportDtype
) -> None:
    """Write the base model's configurations with our stop tokens and the changes of the merge.

    Args:
        config: the base model's config.json.
        chat: the adapter's chat.json, which may be missing.
        out: the merged model's folder, with the base model's generation_config.json if it has one.
        tied: the new tie_word_embeddings; None keeps the old value.
    """
    if export_dtype != "auto":
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": export_dtype}
    if tied is not None:
        config = config | {"tie_word_embeddings": tied}
    generation_file = out / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    stop = read_json(chat).get("stop_token_ids", []) if chat.is_file() else []
    if stop:
        config = config | {"eos_token_id": stop[0]}
        own = generation.get("eos_token_id")  # the base may have more tokens that end an answer
        more = own if isinstance(own, list) else [] if own is None else [own]
        generation["eos_token_id"] = list(dict.fromkeys([*stop, *more]))
    _write_json(out / "config.json", config)
    if generation:
        _write_json(generation_file, generation)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a model's or an adapter's folder; StepFailed if it is missing or is not a JSON object."""
    if not path.exists():
        raise StepFailed(f"{path} is missing", f"make or fetch {path.parent} again")
    try:
        return read_model_json(path)
    except BadInput as error:
        raise StepFailed(error.message, "make or fetch it again") from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
