"""Merge of the adapters that `merge` cannot stream: by PEFT, with the whole model in memory.

PEFT rounds an update to the base's dtype before it adds it. Where a weight and its update nearly cancel, the relative
error is large. Here each layer is merged in float32 and rounded once, as in the streamed merge.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from finetune_assets.models.formats.safetensors import Checkpoint
from finetune_assets.models.loading import load_network
from finetune_assets.reporting.errors import BadInput, StepFailed

# Tensors that PEFT writes into an adapter but never reads, once tokens were added to the base model.
BESIDE = re.compile(r"\.(modules_to_save|original_module|token_adapter)\.")


def merge_with_peft(
    base: Path,
    adapter: Path,
    adapter_config: dict[str, Any],
    out: Path,
    *,
    export_size: float,
    export_dtype: str,
    device: str,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Write the weights of the merged model to `out`, all in one dtype: the configuration's if `export_dtype` is auto.

    Returns:
        The report of `merge`, with "tied": False if embeddings and output layer no longer are one tensor.

    Raises:
        BadInput: PEFT cannot merge the adapter, or it does not belong to the base.
        StepFailed: a merged weight is not finite.
    """
    import torch

    _refuse(adapter_config, adapter)
    model: Any = load_network(base, "auto", trust_remote_code=trust_remote_code)
    was_tied = model.config.get_text_config().tie_word_embeddings
    dtype = None if export_dtype == "auto" else getattr(torch, export_dtype)
    tuned = _adapted(model, base, adapter).to(device)
    _untie(tuned)
    try:
        _merge_layers(tuned, dtype)
        merged: Any = tuned.merge_and_unload()
    except (ValueError, RuntimeError) as error:
        raise StepFailed(f"{adapter}: PEFT cannot merge it: {error}", "train it again") from error
    if dtype is not None:
        merged = merged.to(dtype)
    for name, weight in merged.named_parameters():
        if not torch.isfinite(weight).all():
            raise StepFailed(
                f"{name} is not finite once merged",
                "train it again; if export.export_dtype is float16, set it to bfloat16 or float32 first",
            )
    merged.save_pretrained(out, max_shard_size=int(export_size * 1e9))
    files = sorted(path.name for path in out.glob("model*.safetensors"))
    with Checkpoint(out) as written:
        tensors = len(list(written))
    size = sum((out / file).stat().st_size for file in files)
    tied = False if was_tied and not merged.config.get_text_config().tie_word_embeddings else None
    return {"tensors": tensors, "merged": None, "replaced": [], "shards": files, "bytes": size, "tied": tied}


def _refuse(config: dict[str, Any], adapter: Path) -> None:
    """Raise BadInput for settings that PEFT would ignore silently, or could not reproduce."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind: Any = config.get("peft_type")
    upgrade = f"install the PEFT that wrote it ({config.get('peft_version') or 'not stated'}), and train again"
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise BadInput(f"{adapter}: PEFT {peft.__version__} does not know adapters of type {kind}", upgrade)
    known = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    if unknown := sorted(key for key, value in config.items() if value and key not in known):
        raise BadInput(
            f"{adapter}: PEFT {peft.__version__} does not know {unknown[0]}, which its configuration sets", upgrade
        )
    if config.get("layer_replication"):
        raise BadInput(f"{adapter}: layer_replication builds a model with other layers", "leave it out")
    if str(config.get("init_lora_weights")).startswith("pissa_niter"):
        raise BadInput(
            f"{adapter} began with a random decomposition of the base (pissa_niter), which cannot be reproduced",
            "save it as a plain adapter (save_pretrained with path_initial_model_for_weight_conversion)",
        )


def _adapted(model: Any, base: Path, adapter: Path) -> Any:
    from peft import PeftConfig, PeftModel

    other = "the adapter was trained on another base model"
    try:
        tuned = PeftModel(model, PeftConfig.from_pretrained(str(adapter)))
        if not hasattr(tuned.base_model, "merge_and_unload"):
            raise BadInput(f"{adapter} does not change weights, so that it cannot be merged", "train LoRA")
        loaded = tuned.load_adapter(str(adapter), "default", use_safetensors=True)
    except (RuntimeError, ValueError, KeyError) as error:
        raise BadInput(f"PEFT cannot put {adapter} on {base}: {str(error).strip().splitlines()[0]}", other) from error
    if unexpected := [name for name in loaded.unexpected_keys if not BESIDE.search(name)]:
        raise BadInput(f"{base} has no tensor for {unexpected[0]} of {adapter}", other)
    return tuned


def _untie(tuned: Any) -> None:
    """Split a tensor that serves as embeddings and output layer if the adapter changes one of the two."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch.nn import Parameter

    model: Any = tuned.get_base_model()
    ends: list[Any] = [
        layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None
    ]
    bare: list[Any] = [layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in ends]
    if bare != ends and len(bare) == 2 and bare[0].weight is bare[1].weight:
        bare[1].weight = Parameter(bare[1].weight.detach().clone())


def _merge_layers(tuned: Any, dtype: Any) -> None:
    """Merge each layer in float32, then round it to `dtype`, or to its earlier dtype; one at a time to save memory."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in list(tuned.modules()):
        if not isinstance(layer, BaseTunerLayer):
            continue
        base = layer.get_base_layer()
        before = {name: weight.dtype for name, weight in base.named_parameters()}
        base.float()
        layer.merge(safe_merge=True)
        for name, weight in base.named_parameters():
            weight.data = weight.data.to(dtype or before[name])
