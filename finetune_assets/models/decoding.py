"""A model on a device, and the greedy answers that it gives: the one loop behind scores and chat.

Greedy only: the same prompt gives the same answer, so that two models can be compared by theirs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.chat.tokenizer import load_tokenizer
from finetune_assets.inputs.json_text import read_model_json
from finetune_assets.inputs.remote_code import CONFIG, asked_for, gate, needs_its_own_code, refusal
from finetune_assets.reporting.errors import BadInput, StepFailed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from finetune_assets.machine.device import Device

# A row whose answer is complete, and the row's next token otherwise: (row, token).
Step = list[tuple[int, int]]


@dataclass(frozen=True)
class Chat:
    """How to talk to a model: its tokenizer (chat template set), the default system prompt, and where it stops.

    Attributes:
        default_system: put in front of conversations that bring no system message.
        stop_token_ids: each ends an answer, and is no part of it.
    """

    tokenizer: PreTrainedTokenizerBase
    default_system: str | None
    stop_token_ids: list[int]


def load_chat(folder: Path, *, template: str = "auto", trust_remote_code: bool = False) -> Chat:
    """Tokenizer and chat settings of a base model, adapter or merged model folder.

    chat.json decides where there is one; a base model without it is talked to by its tokenizer's own template.

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
    """The language model of a Hugging Face folder, from safetensors only.

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
    """The model on the device, ready to answer; a `PeftModel` if there is an adapter. Weights from safetensors only.

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


_MAKE_AGAIN = "materialise the asset again; a folder given by hand must be a Hugging Face folder with safetensors"


def context_length(model: Any) -> int | None:
    """Most tokens (prompt and answer) that the model can attend to; None when its configuration does not say."""
    config = model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """The rows as one batch that ends flush: input_ids, attention_mask and position_ids, each (rows, longest).

    Any id serves as padding, as nothing attends to it.
    """
    import torch

    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def greedy_steps(
    model: Any, prompts: Sequence[Sequence[int]], stop_token_ids: Sequence[int], max_new_tokens: int
) -> Iterator[Step]:
    """Answers to all prompts at once, one token of each unfinished row per step.

    A row ends with a stop token (the last that it yields) or after `max_new_tokens`; it then leaves the batch, so that
    the rest gets quicker.

    Args:
        prompts: token ids, none of them empty.

    Yields:
        (row, token) of each row that is still being answered; row counts from 0 in the order of `prompts`.
    """
    import torch

    device = model.device
    stops = set(stop_token_ids)
    batch = left_padded(prompts, device)
    rows = list(range(len(prompts)))
    cache = None
    for _ in range(max_new_tokens):
        # Not around the yield: the mode would reach into the caller's code.
        with torch.inference_mode():
            output = model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens = output.logits[:, -1].argmax(-1)
        cache = output.past_key_values
        answered = tokens.tolist()
        yield list(zip(rows, answered, strict=True))
        keep = [place for place, token in enumerate(answered) if token not in stops]
        if not keep:
            return
        with torch.inference_mode():
            if len(keep) < len(rows):
                rows = [rows[place] for place in keep]
                kept = torch.tensor(keep, device=device)
                cache.reorder_cache(kept)
                tokens = tokens[kept]
                batch = {name: tensor[kept] for name, tensor in batch.items()}
            mask = batch["attention_mask"]
            batch = {
                "input_ids": tokens[:, None],
                "attention_mask": torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1),
                "position_ids": batch["position_ids"][:, -1:] + 1,
            }
