"""Merge of a LoRA adapter into its base model, a few rows at a time: the model is never in memory as a whole.

The stream covers LoRA, rsLoRA and DoRA on linear layers, and modules saved whole. It does PEFT's arithmetic in PEFT's
order, so the float32 result equals that of `merge_and_unload` bit for bit. PEFT itself merges any other adapter, with
the whole model in memory; the report then names the reason. A quantised base model is refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_assets.export.merge.blocks import write_shards
from finetune_assets.export.merge.folder import copy_files, read_json, write_configurations
from finetune_assets.export.merge.plan import ExportDtype, NeedsPeft, merged_spec, origin, plan_merge
from finetune_assets.export.merge.with_peft import merge_with_peft
from finetune_assets.models.formats.safetensors import (
    Checkpoint,
    in_file_order,
    plan_shards,
    quantised_tensor,
    write_index,
)
from finetune_assets.reporting.errors import BadInput
from finetune_assets.reporting.events import Progress, StepProgress, silent

# Keys under which a configuration describes its quantisation: Hugging Face's, old compressed-tensors', MLX's.
QUANTISED = ("quantization_config", "compression_config", "quantization")


def merge(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    export_size: float,
    export_dtype: ExportDtype,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Merge `adapter` into `base`, and write the result to `out` as a Hugging Face folder.

    Args:
        export_size: largest shard, in GB (10^9 bytes).
        export_dtype: dtype of the floating-point weights; "auto" keeps each tensor's own.
        trust_remote_code: run the base model's own code where PEFT merges.
        device: torch's name of the device that computes; devices other than the CPU may round sums differently.
        progress: is called with a `StepProgress` for each tensor that is written.

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
        stream = _Stream(config, adapter_config, int(export_size * 1e9), export_dtype, device, progress)
        report = stream.write(base, adapter, out)
    except NeedsPeft as reason:
        done = merge_with_peft(
            base, adapter, adapter_config, out,
            export_size=export_size, export_dtype=export_dtype, device=device, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        report = {"method": "peft", "reason": str(reason)} | done
    copy_files(base, adapter, out, trust=trust_remote_code)
    write_configurations(config, adapter / "chat.json", out, tied=report.pop("tied"), export_dtype=export_dtype)
    return report | {"seconds": round(time.perf_counter() - started, 3)}


def refuse_quantised(config: dict[str, Any], base: Path) -> None:
    """Raise BadInput for a base model that is quantised, by its configuration or by its files."""
    parts = (config, config.get("text_config") or {})
    quantisation = next((part[key] for part in parts for key in QUANTISED if part.get(key)), None)
    if quantisation is not None:
        stated = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        method = stated or json.dumps(quantisation)
    elif (stored := quantised_tensor(base)) is not None:
        method = f"{stored.name} is stored as {stored.dtype}"
    else:
        return
    raise BadInput(
        f"{base} is quantised ({method}): an adapter merged into quantised weights is not the trained model",
        "train and merge with the unquantised base model; quantise afterwards (gguf.types)",
    )


@dataclass(frozen=True)
class _Stream:
    """A streamed merge: the configurations of base and adapter, and the options of the result."""

    config: dict[str, Any]
    adapter_config: dict[str, Any]
    shard_bytes: int
    export_dtype: ExportDtype
    device: str
    progress: Progress

    def write(self, base: Path, adapter: Path, out: Path) -> dict[str, Any]:
        """Write the weights and their index; return the report of `merge`, with "tied" (see `Plan`)."""
        with Checkpoint(base) as weights, Checkpoint(adapter, "adapter_model.safetensors") as lora:
            plan = plan_merge(weights, lora, self.config, self.adapter_config)
            specs = [merged_spec(name, plan, weights, self.export_dtype) for name in plan.source]
            shards = {file: in_file_order(part) for file, part in plan_shards(specs, self.shard_bytes).items()}
            origins = {
                out / file: [(spec, origin(spec.name, plan, weights, lora)) for spec in part]
                for file, part in shards.items()
            }
            write_shards(origins, lora, self.device, self._counter(len(specs)))
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

    def _counter(self, steps: int) -> Callable[[], None]:
        """Return a function that reports one more tensor with each call."""
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            self.progress(StepProgress(step=done, steps=steps))

        return count
