"""Models and tokenizers of Hugging Face folders, loaded onto a device."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.chat.tokenizer import load_tokenizer
from finetune_assets.inputs.json_text import read_model_json
from finetune_assets.inputs.remote_code import CONFIG, asked_for, gate, needs_its_own_code, refusal
from finetune_assets.models.formats.safetensors import Checkpoint
from finetune_assets.reporting.errors import BadInput, StepFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune_assets.machine.device import Device, Precision

_MAKE_AGAIN = "materialise the asset again; a folder given by hand must be a Hugging Face folder with safetensors"
_PRECISIONS: dict[str, Precision] = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}


@dataclass(frozen=True)
class Chat:
    """How to talk to a model: its tokenizer (chat template set), the default system prompt, and where it stops.

    Attributes:
        default_system: put in front of conversations that bring no system message.
        stop_token_ids: each ends an answer and does not belong to it.
    """

    tokenizer: PreTrainedTokenizerBase
    default_system: str | None
    stop_token_ids: list[int]


def load_chat(folder: Path, *, template: str = "auto", trust_remote_code: bool = False) -> Chat:
    """Load the tokenizer and chat settings of a base model, adapter or merged model folder.

    chat.json decides if the folder has one; a base model without it uses its tokenizer's own template.

    Args:
        template: for a base model that has none of its own (see `chat.template.resolve_template`).

    Raises:
        StepFailed: no tokenizer in the folder, or a chat.json that is not readable.
        BadInput: no chat template anywhere.
    """
    from finetune_assets.chat.template import resolve_template, stop_tokens

    try:
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files make the libraries raise errors of every kind
        raise StepFailed(f"{folder}: no tokenizer can be loaded from there: {error}", _MAKE_AGAIN) from error
    path = folder / "chat.json"
    if not path.is_file():
        tokenizer.chat_template = resolve_template("auto" if tokenizer.chat_template else template, tokenizer)
        return Chat(tokenizer, None, stop_tokens(tokenizer, tokenizer.chat_template))
    try:
        settings = read_model_json(path)
        tokenizer.chat_template = settings["template"]
        return Chat(tokenizer, settings["default_system"], settings["stop_token_ids"])
    except (BadInput, KeyError) as error:
        raise StepFailed(f"{path}: not the chat settings of a trained model: {error!r}", _MAKE_AGAIN) from error


def load_network(folder: Path, dtype: Any, *, trust_remote_code: bool = False) -> Any:
    """Load the language model of a Hugging Face folder, from safetensors only.

    Args:
        dtype: a torch.dtype, or "auto" for that of the configuration.

    Raises:
        StepFailed: it cannot be loaded, or files lack weights: transformers would make up random ones.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours tell the progress
    try:
        with gate(trust=trust_remote_code):
            both: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError, ImportError) as error:
        reason = refusal(error)
        needs = needs_its_own_code(f"cannot load the model {folder}", folder, CONFIG, reason) if reason else None
        raise needs or StepFailed(f"{folder}: the model cannot be loaded: {error}", _MAKE_AGAIN) from error
    network, loaded = both
    if missing := sorted(loaded["missing_keys"]):
        asked = [] if trust_remote_code else asked_for(folder, CONFIG)
        raise StepFailed(
            f"{folder}: its files have no weights for {missing[0]} ({len(missing)} missing in all)",
            "they do not belong to its config.json, or are of another kind of model than a causal language model"
            + (f", or this model needs its own code, which is not run ({asked[0]})" if asked else ""),
        )
    return network


def load_model(base: Path, adapter: Path | None, device: Device, *, trust_remote_code: bool = False) -> Any:
    """Load a model onto a device, from safetensors only; return a `PeftModel` if there is an adapter.

    Raises:
        StepFailed: base or adapter cannot be loaded.
    """
    model: Any = load_network(base, device.dtype, trust_remote_code=trust_remote_code)
    if adapter is not None:
        from peft import PeftModel

        # Without this PEFT would fall back to a pickle, or ask a hub for the folder's name.
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (adapter / name).is_file():
                raise StepFailed(f"{adapter}: there is no {name} in this adapter folder", _MAKE_AGAIN)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations that two libraries have to settle among themselves
                with gate(trust=trust_remote_code):
                    model = PeftModel.from_pretrained(model, str(adapter), use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise StepFailed(f"{adapter}: the adapter does not fit the model {base}: {error}", _MAKE_AGAIN) from error
    return model.to(device.torch_device).eval()


def context_length(model: Any) -> int | None:
    """Return the most tokens (prompt and answer) that the model can attend to; None if its configuration lacks it."""
    config = model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def suited(device: Device, merged: Path) -> Device:
    """Return the device with the best precision in which the merged model fits its memory, float32 if possible."""
    with Checkpoint(merged) as checkpoint:
        specs = [checkpoint.spec(name) for name in checkpoint]
    weights: Counter[str] = Counter()
    for spec in specs:
        weights[spec.dtype] += math.prod(spec.shape)
    own = _PRECISIONS.get(weights.most_common(1)[0][0], "fp32")
    fits = weights.total() * 4 < 0.7 * device.memory_gib * 2**30
    return dataclasses.replace(device, precision="fp32" if fits else own)
