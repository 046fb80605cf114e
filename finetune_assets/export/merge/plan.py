"""Plan of a streamed merge: which tensors the merged model has, and where each of them comes from."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune_assets.export.merge.blocks import Origin, Update
from finetune_assets.export.merge.with_peft import BESIDE
from finetune_assets.models.formats.safetensors import FLOATS, Checkpoint, Spec
from finetune_assets.reporting.errors import BadInput

ExportDtype = Literal["auto", "float32", "float16", "bfloat16"]
Shape = tuple[int, ...]

# Keys of an adapter's configuration that the streamed merge implements, or that do not affect the weights.
UNDERSTOOD = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules",
    "modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "inference_mode",
    "base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "megatron_core",
    "qalora_group_size", "bias", "init_lora_weights",
}  # fmt: skip
PREFIX = "base_model.model."  # of the names of an adapter's tensors
LORA_A, LORA_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
HEAD = "lm_head.weight"
PEFT_DEFAULT = 8  # of r and of lora_alpha


class NeedsPeft(Exception):
    """The reason why the streamed merge cannot merge an adapter."""


@dataclass(frozen=True)
class Plan:
    """All tensors of the merged model, and the source of each."""

    source: dict[str, str]  # merged tensor -> base tensor that it starts from
    updates: dict[str, Update]  # merged tensor -> its LoRA update
    replaced: dict[str, str]  # merged tensor -> adapter tensor that takes the base tensor's place, before any update
    tied: bool | None  # the new tie_word_embeddings; None keeps the configuration's


def plan_merge(weights: Checkpoint, lora: Checkpoint, config: dict[str, Any], adapter_config: dict[str, Any]) -> Plan:
    """Decide how each tensor of the merged model is computed.

    Args:
        weights, config: tensors and configuration of the base model.
        lora, adapter_config: tensors and configuration of the adapter.

    Raises:
        NeedsPeft: the streamed merge does not implement something that the adapter does.
        BadInput: the adapter does not belong to the base model, or is incomplete.
    """
    _check_vocabulary(weights, lora)
    _check_understood(adapter_config)
    source, trained, tied = _with_ends(weights, config, lora, _trained(lora))
    updates: dict[str, Update] = {}
    replaced: dict[str, str] = {}
    for short, name in trained.items():
        if short.endswith((LORA_B, MAGNITUDE)):
            continue  # they belong to the lora_A of the same module
        if short.endswith(LORA_A):
            module = short.removesuffix(LORA_A)
            target = f"{module}.weight"
            updates[target] = _update(module, name, lora, adapter_config)
        elif ".lora_" in short:
            raise NeedsPeft(f"the adapter holds {name}")
        else:
            # A module saved whole, or (base_layer) the embeddings that PEFT adds when one of them has an adapter.
            target = short.replace(".base_layer.", ".")
            replaced[target] = name
        if target not in source:
            raise NeedsPeft(f"{weights.folder.name} stores no tensor named {target}")
    plan = Plan(source, updates, replaced, False if tied is False else None)
    _check_shapes(plan, weights, lora)
    return plan


def origin(name: str, plan: Plan, weights: Checkpoint, lora: Checkpoint) -> Origin:
    """Return the stored tensor that a merged tensor starts from, and its update."""
    update = plan.updates.get(name)
    if (replacement := plan.replaced.get(name)) is not None:
        return Origin(lora, replacement, update)
    return Origin(weights, plan.source[name], update)


def merged_spec(name: str, plan: Plan, weights: Checkpoint, export_dtype: ExportDtype) -> Spec:
    """Return dtype and shape of a merged tensor."""
    stored = weights.spec(plan.source[name])
    cast = export_dtype != "auto" and stored.dtype in FLOATS.values()
    dtype = FLOATS[export_dtype] if cast else stored.dtype
    return Spec(name, dtype, stored.shape)


def _check_vocabulary(weights: Checkpoint, lora: Checkpoint) -> None:
    """Raise BadInput if the adapter's embeddings or output layer have another number of tokens than the base model."""
    if (embeddings := _embeddings(weights)) is None:
        return
    tokens, width = weights.spec(embeddings).shape
    for name in lora:
        of_tokens = name.startswith(tuple(PREFIX + own.removesuffix("weight") for own in (embeddings, HEAD)))
        if not of_tokens or ".lora_" in name or (shape := lora.spec(name).shape)[1:] != (width,):
            continue
        if name.endswith(".weight") and shape[0] != tokens:
            raise BadInput(
                f"{lora.folder}: {name} has {shape[0]} tokens, {weights.folder} has {tokens}",
                "if tokens were added before training, add them to the base model too, and merge into that "
                "(resize_token_embeddings, save_pretrained); otherwise use the adapter's own base model",
            )


def _check_understood(adapter_config: dict[str, Any]) -> None:
    if adapter_config.get("peft_type") != "LORA":
        raise NeedsPeft(f"adapter type {adapter_config.get('peft_type')}")
    if adapter_config.get("bias", "none") != "none":
        raise NeedsPeft(f"trained biases (bias: {adapter_config['bias']})")
    if isinstance(initial := adapter_config.get("init_lora_weights", True), str) and initial not in (
        "gaussian",
        "orthogonal",
    ):
        raise NeedsPeft(f"init_lora_weights: {initial} changes the base weights")
    for key, value in sorted(adapter_config.items()):
        if key not in UNDERSTOOD and value:
            raise NeedsPeft(f"{key} is set")


def _trained(lora: Checkpoint) -> dict[str, str]:
    """Return the adapter's tensors by their names in the base model, without those that PEFT writes but never reads."""
    trained = {name.removeprefix(PREFIX): name for name in lora}
    return {short: name for short, name in trained.items() if BESIDE.sub(".", short) not in trained.keys() - {short}}


def _with_ends(
    weights: Checkpoint, config: dict[str, Any], lora: Checkpoint, trained: dict[str, str]
) -> tuple[dict[str, str], dict[str, str], bool]:
    """Return source and trained tensors, and whether input and output embeddings are one tensor in the result."""
    source = {name: name for name in weights}
    embeddings = _embeddings(weights)
    if not _tied(weights, config, embeddings):
        return source, trained, False
    if embeddings is None:
        return source, trained, True
    source.pop(HEAD, None)
    of_both = tuple(name.removesuffix("weight") for name in (embeddings, HEAD))
    touched = {short for short in trained if short.startswith(of_both)}
    if touched == {embeddings, HEAD} and _equal(lora, *(trained[short] for short in touched)):
        return source, {short: name for short, name in trained.items() if short != HEAD}, True
    if not touched:
        return source, trained, True
    # Only one of the two was trained, so that they differ: the result stores both.
    return source | {HEAD: embeddings}, trained, False


def _embeddings(weights: Checkpoint) -> str | None:
    """Return the name of the input embeddings; None if it is not known."""
    names = [name for name in weights if name.endswith("embed_tokens.weight")]
    return names[0] if len(names) == 1 else None


def _tied(weights: Checkpoint, config: dict[str, Any], embeddings: str | None) -> bool:
    """Return whether input and output embeddings are one tensor; if two different ones are stored, they are not."""
    stated = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings"))
    if HEAD not in weights:
        return stated is None or bool(stated)
    return bool(stated) and (embeddings is None or _equal(weights, embeddings, HEAD))


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    import torch

    return torch.equal(checkpoint.tensor(one), checkpoint.tensor(other))


def _update(module: str, name: str, lora: Checkpoint, adapter_config: dict[str, Any]) -> Update:
    """Return the update of a module's weight; `name` is the module's lora_A."""
    partner, magnitude = f"{PREFIX}{module}{LORA_B}", f"{PREFIX}{module}{MAGNITUDE}"
    if partner not in lora:
        raise BadInput(f"{lora.folder}: {name} has no {partner}", "make or fetch the adapter again")
    has_magnitude = bool(adapter_config.get("use_dora"))
    if has_magnitude != (magnitude in lora):
        raise NeedsPeft(f"use_dora and the magnitudes of {module} disagree")
    scale = _scale(module, adapter_config, lora.spec(name).shape[0], lora.folder)
    return Update(name, partner, magnitude if has_magnitude else None, scale)


def _scale(module: str, config: dict[str, Any], rank: int, folder: Path) -> float:
    expected = _pattern(config.get("rank_pattern"), module, config.get("r", PEFT_DEFAULT))
    if rank != expected:
        raise BadInput(
            f"{folder}: the adapter of {module} has rank {rank}, adapter_config.json says {expected}",
            "adapter_config.json and adapter_model.safetensors belong to different adapters",
        )
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", PEFT_DEFAULT))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's name, as PEFT matches it."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _check_shapes(plan: Plan, weights: Checkpoint, lora: Checkpoint) -> None:
    for target, update in plan.updates.items():
        shape = weights.spec(plan.source[target]).shape
        a, b = lora.spec(update.a).shape, lora.spec(update.b).shape
        if len(shape) != 2 or len(a) != 2:
            raise NeedsPeft(f"{target} is no matrix")
        if (dtype := weights.spec(plan.source[target]).dtype) not in FLOATS.values():
            raise NeedsPeft(f"{target} is stored as {dtype}")
        sizes = [(update.a, a, (a[0], shape[1])), (update.b, b, (shape[0], a[0]))]
        if update.magnitude is not None:
            sizes.append((update.magnitude, lora.spec(update.magnitude).shape, (shape[0],)))
        for name, actual, expected in sizes:
            _same_shape(name, actual, expected, weights, lora)
    for target, name in plan.replaced.items():
        if not {lora.spec(name).dtype, weights.spec(plan.source[target]).dtype} <= set(FLOATS.values()):
            raise NeedsPeft(f"{name} or what it replaces is neither float32 nor a 16-bit float")
        _same_shape(name, lora.spec(name).shape, weights.spec(plan.source[target]).shape, weights, lora)


def _same_shape(
    name: str, shape: tuple[int, ...], expected: tuple[int, ...], weights: Checkpoint, lora: Checkpoint
) -> None:
    if shape != expected:
        raise BadInput(
            f"{lora.folder}: {name} has shape {list(shape)}, {weights.folder.name} needs {list(expected)}",
            "the adapter was trained on another base model",
        )
