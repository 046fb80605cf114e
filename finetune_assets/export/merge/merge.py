"""Merge a LoRA adapter into its base model, a few rows at a time: memory is some blocks of them, not one model's.

Covers LoRA, rsLoRA and DoRA on linear layers, and modules saved whole; the arithmetic and its order are PEFT's, so
that the result in float32 equals `merge_and_unload` bit for bit. Any other adapter goes through PEFT itself, with the
whole model in memory, and the report says so. A quantised base is refused.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune_assets.export.merge.blocks import Origin, Update, write_shards
from finetune_assets.export.merge.with_peft import BESIDE, merge_with_peft
from finetune_assets.inputs.json_text import read_model_json
from finetune_assets.inputs.remote_code import SOURCES, is_code
from finetune_assets.models.formats.model_card import read_card, write_card
from finetune_assets.models.formats.safetensors import (
    FLOATS,
    Checkpoint,
    Spec,
    in_file_order,
    plan_shards,
    quantised_tensor,
    write_index,
)
from finetune_assets.reporting.errors import BadInput, StepFailed

ExportDtype = Literal["auto", "float32", "float16", "bfloat16"]
Progress = Callable[[dict[str, Any]], None]

# Everything in an adapter's configuration that the streamed merge knows, or that leaves the weights alone.
UNDERSTOOD = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules",
    "modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "inference_mode",
    "base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "megatron_core",
    "qalora_group_size", "bias", "init_lora_weights",
}  # fmt: skip
# Where a configuration says how its weights were quantised: Hugging Face's, compressed-tensors' of old, MLX's.
QUANTISED = ("quantization_config", "compression_config", "quantization")
FROM_BASE = ("config.json", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
FROM_ADAPTER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "*.tiktoken", "chat_template.jinja", "chat.json",
)  # fmt: skip
PREFIX = "base_model.model."  # of an adapter's tensors
HEAD = "lm_head.weight"
PEFT_DEFAULT = 8  # of r and of lora_alpha


class NeedsPeft(Exception):
    """Why this adapter cannot be merged by streaming."""


@dataclass(frozen=True)
class Plan:
    """All tensors of the merged model, and where each comes from."""

    source: dict[str, str]  # merged tensor -> base tensor it starts from
    updates: dict[str, Update]  # merged tensor -> its LoRA update
    replaced: dict[str, str]  # merged tensor -> adapter tensor that takes the base tensor's place, before any update
    tied: bool | None  # what tie_word_embeddings has to say; None: leave the configuration alone


def merge(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    export_size: float,
    export_dtype: ExportDtype,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `base` with `adapter` merged into it as a Hugging Face folder to `out`.

    Args:
        export_size: largest shard, in GB (10^9 bytes).
        export_dtype: dtype of the floating-point weights; "auto" keeps each tensor's own.
        trust_remote_code: run the base's own code, where PEFT does the work.
        device: torch's name of where to compute; elsewhere than on the CPU sums may be rounded otherwise.
        progress: called with {"event": "step", "step": tensors written, "steps": all of them}.

    Returns:
        A report: method ("streamed" or "peft", then with a reason), tensors, merged, replaced, shards, bytes, seconds.

    Raises:
        BadInput: the base is quantised, or the adapter does not belong to it.
        StepFailed: files are missing or damaged, or a merged weight is not finite.
    """
    started = time.perf_counter()
    config = read_json(base / "config.json")
    adapter_config = read_json(adapter / "adapter_config.json")
    refuse_quantised(config, base)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any]
    try:
        report = _stream(base, adapter, out, config, adapter_config, export_size, export_dtype, device, progress)
    except NeedsPeft as reason:
        done = merge_with_peft(
            base, adapter, adapter_config, out,
            export_size=export_size, export_dtype=export_dtype, device=device, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        report = {"method": "peft", "reason": str(reason)} | done
    _copy_companions(base, adapter, out, config, report.pop("tied"), export_dtype, trust_remote_code)
    return report | {"seconds": round(time.perf_counter() - started, 3)}


def refuse_quantised(config: dict[str, Any], base: Path) -> None:
    """BadInput for a base model whose weights are not the real ones any more, by its configuration or by its files."""
    parts = (config, config.get("text_config") or {})
    said = next((part[key] for part in parts for key in QUANTISED if part.get(key)), None)
    if said is not None:
        method = (said.get("quant_method") if isinstance(said, dict) else None) or json.dumps(said)
    elif (stored := quantised_tensor(base)) is not None:
        method = f"{stored.name} is stored as {stored.dtype}"
    else:
        return
    raise BadInput(
        f"{base} is quantised ({method}): an adapter merged into rounded weights is not the model that was trained",
        "train and merge with the unquantised base model; quantise afterwards (gguf.types)",
    )


def _stream(
    base: Path,
    adapter: Path,
    out: Path,
    config: dict[str, Any],
    adapter_config: dict[str, Any],
    export_size: float,
    export_dtype: ExportDtype,
    device: str,
    progress: Progress | None,
) -> dict[str, Any]:
    with Checkpoint(base) as weights, Checkpoint(adapter, "adapter_model.safetensors") as lora:
        _check_vocabulary(weights, lora)
        _check_understood(adapter_config)
        plan = _plan(weights, lora, config, adapter_config)
        _check_shapes(plan, weights, lora)
        specs = [_spec(plan, weights, name, export_dtype) for name in plan.source]
        shards = {file: in_file_order(part) for file, part in plan_shards(specs, int(export_size * 1e9)).items()}
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress({"event": "step", "step": done, "steps": len(specs)})

        origins = {
            out / file: [(spec, _origin(spec.name, plan, weights, lora)) for spec in part]
            for file, part in shards.items()
        }
        write_shards(origins, lora, device, count)
    write_index(out, shards)
    return {
        "method": "streamed",
        "tensors": len(specs),
        "merged": len(plan.updates),
        "replaced": sorted(plan.replaced),
        "shards": list(shards),
        "bytes": sum(spec.nbytes for spec in specs),
        "tied": plan.tied,
    }


def _check_vocabulary(weights: Checkpoint, lora: Checkpoint) -> None:
    """BadInput where the adapter brings embeddings, or an output layer, of more or fewer tokens than the base has."""
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
                "if tokens were added before training, add them to the base model, too, and merge into that "
                "(resize_token_embeddings, save_pretrained); else the adapter is another model's",
            )


def _check_understood(adapter_config: dict[str, Any]) -> None:
    if adapter_config.get("peft_type") != "LORA":
        raise NeedsPeft(f"adapter type {adapter_config.get('peft_type')}")
    if adapter_config.get("bias", "none") != "none":
        raise NeedsPeft(f"trained biases (bias: {adapter_config['bias']})")
    if isinstance(how := adapter_config.get("init_lora_weights", True), str) and how not in ("gaussian", "orthogonal"):
        raise NeedsPeft(f"init_lora_weights: {how} changes the base weights")
    for key, value in sorted(adapter_config.items()):
        if key not in UNDERSTOOD and value:
            raise NeedsPeft(f"{key} is set")


def _plan(weights: Checkpoint, lora: Checkpoint, config: dict[str, Any], adapter_config: dict[str, Any]) -> Plan:
    source = {name: name for name in weights}
    embeddings = _embeddings(weights)
    tied = _tied(weights, config, embeddings)
    trained = {name.removeprefix(PREFIX): name for name in lora}
    trained = {short: name for short, name in trained.items() if BESIDE.sub(".", short) not in trained.keys() - {short}}
    if tied and embeddings is not None:
        source.pop(HEAD, None)
        of_both = tuple(name.removesuffix("weight") for name in (embeddings, HEAD))
        touched = {short for short in trained if short.startswith(of_both)}
        if touched == {embeddings, HEAD} and _equal(lora, *(trained[short] for short in touched)):
            del trained[HEAD]
        elif touched:
            # One of the two was trained without the other: they are two tensors from now on.
            source[HEAD] = embeddings
            tied = False
    updates: dict[str, Update] = {}
    replaced: dict[str, str] = {}
    for short, name in trained.items():
        if short.endswith(".lora_A.weight"):
            module = short.removesuffix(".lora_A.weight")
            target = f"{module}.weight"
            partner = f"{PREFIX}{module}.lora_B.weight"
            magnitude = f"{PREFIX}{module}.lora_magnitude_vector"
            if partner not in lora:
                raise BadInput(f"{lora.folder}: {name} has no {partner} beside it", "make or fetch the adapter again")
            has_magnitude = bool(adapter_config.get("use_dora"))
            if has_magnitude != (magnitude in lora):
                raise NeedsPeft(f"use_dora and the magnitudes of {module} disagree")
            scale = _scale(module, adapter_config, lora.spec(name).shape[0], lora.folder)
            updates[target] = Update(name, partner, magnitude if has_magnitude else None, scale)
        elif short.endswith((".lora_B.weight", ".lora_magnitude_vector")):
            target = None
        elif ".lora_" in short:
            raise NeedsPeft(f"the adapter holds {name}")
        else:
            # A module saved whole, or (base_layer) the embeddings that PEFT adds when one of them has an adapter.
            target = short.replace(".base_layer.", ".")
            replaced[target] = name
        if target is not None and target not in source:
            raise NeedsPeft(f"{weights.folder.name} stores no tensor named {target}")
    return Plan(source, updates, replaced, tied if tied is False else None)


def _embeddings(weights: Checkpoint) -> str | None:
    """The name of the input embeddings, where it is known."""
    names = [name for name in weights if name.endswith("embed_tokens.weight")]
    return names[0] if len(names) == 1 else None


def _tied(weights: Checkpoint, config: dict[str, Any], embeddings: str | None) -> bool:
    """Whether output and input embeddings are one tensor; two that are stored and differ are not, whatever is said."""
    said = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings"))
    if HEAD not in weights:
        return said is None or bool(said)
    return bool(said) and (embeddings is None or _equal(weights, embeddings, HEAD))


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    import torch

    return torch.equal(checkpoint.tensor(one), checkpoint.tensor(other))


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
    """The value of the first pattern that matches the end of a module's name, as PEFT matches it."""
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
        for name, has, wants in sizes:
            _same_shape(name, has, wants, weights, lora)
    for target, name in plan.replaced.items():
        if not {lora.spec(name).dtype, weights.spec(plan.source[target]).dtype} <= set(FLOATS.values()):
            raise NeedsPeft(f"{name} or what it replaces is neither float32 nor a 16-bit float")
        _same_shape(name, lora.spec(name).shape, weights.spec(plan.source[target]).shape, weights, lora)


def _same_shape(name: str, has: tuple[int, ...], wants: tuple[int, ...], weights: Checkpoint, lora: Checkpoint) -> None:
    if has != wants:
        raise BadInput(
            f"{lora.folder}: {name} has shape {list(has)}, {weights.folder.name} needs {list(wants)}",
            "the adapter was trained on another base model",
        )


def _origin(name: str, plan: Plan, weights: Checkpoint, lora: Checkpoint) -> Origin:
    update = plan.updates.get(name)
    if (replacement := plan.replaced.get(name)) is not None:
        return Origin(lora, replacement, update)
    return Origin(weights, plan.source[name], update)


def _spec(plan: Plan, weights: Checkpoint, name: str, export_dtype: ExportDtype) -> Spec:
    stored = weights.spec(plan.source[name])
    cast = export_dtype != "auto" and stored.dtype in FLOATS.values()
    dtype = FLOATS[export_dtype] if cast else stored.dtype
    return Spec(name, dtype, stored.shape)


def _copy_companions(
    base: Path,
    adapter: Path,
    out: Path,
    config: dict[str, Any],
    tied: bool | None,
    export_dtype: ExportDtype,
    trust: bool,
) -> None:
    """Tokenizer and chat files from the adapter (else the base), configurations from the base with our stop tokens.

    The model's own code comes along if it is trusted; the tokenizer's is written to the adapter with the tokenizer.
    """
    code = (SOURCES,) if trust else ()
    for folder, patterns in ((base, (*FROM_BASE, *FROM_ADAPTER, *code)), (adapter, (*FROM_ADAPTER, *code))):
        for pattern in patterns:
            for file in sorted(folder.glob(pattern)):
                if file.is_file() and (pattern in code or not is_code(file.name)):
                    shutil.copyfile(file, out / file.name)
    if export_dtype != "auto":
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": export_dtype}
    if tied is not None:
        config = config | {"tie_word_embeddings": tied}
    generation_file = out / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    chat_file = adapter / "chat.json"
    stop = read_json(chat_file).get("stop_token_ids", []) if chat_file.is_file() else []
    if stop:
        config = config | {"eos_token_id": stop[0]}
        own = generation.get("eos_token_id")  # the base may have more tokens that end an answer
        more = own if isinstance(own, list) else [] if own is None else [own]
        generation["eos_token_id"] = list(dict.fromkeys([*stop, *more]))
    write_card(out, read_card(base), "A base model and an adapter, merged. Licence and languages are the base model's.")
    _write_json(out / "config.json", config)
    if generation:
        _write_json(generation_file, generation)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model's or an adapter's folder; StepFailed where it is missing or none."""
    if not path.exists():
        raise StepFailed(f"{path} is missing", f"{path.parent} is not what it should be; make or fetch it again")
    try:
        return read_model_json(path)
    except BadInput as error:
        raise StepFailed(error.message, "make or fetch it again") from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
