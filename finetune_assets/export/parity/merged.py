"""Proof that a merged model is its base with its adapter: by logits on held-out rows, and weight by weight.

PEFT is the other side. It puts the adapter on the base and computes with the two, as training did; then it merges
them in memory. Logits show what is wrong with the model as a whole. Where weights are rounded to 16 bits, the rounding
of the logits may hide a missing layer; its own weights do not.
"""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.export.parity.checks.failure import Failure
from finetune_assets.export.parity.held_out import choose, logits
from finetune_assets.models.formats.safetensors import Checkpoint
from finetune_assets.models.loading import load_chat, load_model, suited
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.reporting.events import Progress, message, silent

if TYPE_CHECKING:
    import torch

    from finetune_assets.machine.device import Device

CONVERSATIONS = 4
POINTS = 32
LONGEST = 256  # tokens of a conversation

# Largest distance of the logits: |merged - tuned| / |tuned|, all points together, less each point's mean. Measured on
# 135M, 30 layers: 2e-6 for weights stored in float32, 0.001 in float16, 0.007 in bfloat16. An adapter left out is 0.5
# there, half of its scale 0.27, and a single layer left out 0.002 to 0.03.
LIMITS = {"F32": 1e-4, "F16": 0.01, "BF16": 0.05}
HALF_PRECISION = 0.1  # of a model too large to be computed in float32; measured in bfloat16: 0.026
CHUNK = 1 << 24  # weights compared at a time


def check(
    base: Path,
    adapter: Path,
    merged: Path,
    held_out: Path,
    device: Device,
    *,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compare the merged model with base and adapter; one of the two is in memory at a time.

    Args:
        base, adapter, merged: Hugging Face folders; `merged` with chat.json.
        held_out: test.jsonl; if it has no rows, a few built-in sentences are read.

    Returns:
        difference: distance of the logits (see `LIMITS`); allowed: the largest that passes; effect: the distance that
        the adapter makes, for comparison; kl_from_base: the same as mean KL(base + adapter || base), nats;
        weights_compared: tensors; places: points; precision and device of the computation.

    Raises:
        StepFailed: the merged model is another one; the message says by which check (logits, weights).
    """
    import torch

    chosen = choose(
        held_out, load_chat(merged, trust_remote_code=trust_remote_code),
        conversations=CONVERSATIONS, points=POINTS, longest=LONGEST,
    )  # fmt: skip
    device = suited(device, merged)

    def says(model: Any) -> torch.Tensor:
        told = torch.cat(logits(model, chosen))
        return told - told.mean(-1, keepdim=True)  # a constant on all tokens has no effect

    progress(message(f"reading held-out rows with base and adapter on {device.name}"))
    model = load_model(base, adapter, device, trust_remote_code=trust_remote_code)
    tuned = says(model)
    with model.disable_adapter():
        before = says(model)
    effect, moved = _distance(before, tuned), _divergence(tuned, before)
    with Checkpoint(merged) as checkpoint:
        compared, failures = _weights(model.merge_and_unload(), checkpoint)
        stored = {checkpoint.spec(name).dtype for name in checkpoint}
    del model
    gc.collect()
    progress(message("reading them with the merged model"))
    difference = _distance(says(load_model(merged, None, device, trust_remote_code=trust_remote_code)), tuned)
    allowed = max((LIMITS[dtype] for dtype in stored if dtype in LIMITS), default=LIMITS["F32"])
    if device.precision != "fp32":
        allowed = HALF_PRECISION
    if not difference <= allowed:  # a non-finite difference fails, too
        failures.insert(0, Failure("logits", f"relative distance {difference:.2g}", f"{allowed:g}"))
    if failures:
        listing = "\n".join(f"  check {failure}" for failure in failures)
        raise StepFailed(
            f"the merged model is not base + adapter:\n{listing}",
            "nothing was published; check that the adapter was trained on this base; if it was, report this as a bug",
        )
    return {
        "difference": float(f"{difference:.3g}"),
        "allowed": allowed,
        "effect": float(f"{effect:.3g}"),
        "kl_from_base": float(f"{moved:.3g}"),
        "weights_compared": compared,
        "places": len(tuned),
        "precision": device.precision,
        "device": device.name,
    }


def _distance(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((ours - wanted).norm() / wanted.norm())


def _divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the mean KL(ours || theirs) of the next token in nats, from logits. Shape of each (points, vocabulary)."""
    mine, other = (told.double().log_softmax(-1) for told in (ours, theirs))
    return float((mine.exp() * (mine - other)).sum(-1).mean())


def _weights(model: Any, checkpoint: Checkpoint) -> tuple[int, list[Failure]]:
    """Return the number of tensors compared with PEFT's, and a failure that names the worst tensor, if one is wrong."""
    compared, worst, found = 0, 1.0, []
    for held in _as_in_files(model):
        names: dict[int, list[str]] = {}  # of one tensor: tied embeddings have two
        for name, tensor in held.items():
            names.setdefault(tensor.data_ptr(), []).append(name)
        for name, wanted in held.items():
            if name not in checkpoint or tuple(wanted.shape) != checkpoint.spec(name).shape:
                continue
            if len(same := names[wanted.data_ptr()]) > 1 and all(other in checkpoint for other in same):
                continue  # one tensor in PEFT's merge, which cannot hold two; rightly two in ours
            compared += 1
            if (off := _off(checkpoint.tensor(name).to(wanted.device), wanted)) > worst or math.isnan(off):
                worst = off
                found = [Failure("weights", f"{name} differs by {off:.3g} times the rounding error", "1")]
    return compared, found


def _as_in_files(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors of each layer as files name and cut them. Some are copies, so it is a layer at a time."""
    from transformers.core_model_loading import revert_weight_conversion

    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        layers.setdefault(re.findall(r"^\D*\d+\.|^", name)[0], {})[name] = tensor
    return (revert_weight_conversion(model, layer) for layer in layers.values())


def _off(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference of two weights, as a multiple of the rounding error of their dtypes."""
    import torch

    if torch.equal(ours, wanted.to(ours.dtype)):
        return 0.0
    if not ours.is_floating_point():
        return float("inf")
    stored, computed = torch.finfo(ours.dtype), torch.finfo(wanted.dtype)
    eps = max(stored.eps, computed.eps)
    # sums and products of another device in float32; sums that PEFT itself rounds to 16 bits before it adds them
    slack = max(10 * torch.finfo(torch.float32).eps, computed.eps) * float(wanted.float().pow(2).mean().sqrt())
    floor = slack + stored.smallest_normal * stored.eps
    parts = zip(ours.reshape(-1).split(CHUNK), wanted.reshape(-1).split(CHUNK), strict=True)
    ratios = [float(((a.float() - b.float()).abs() / (eps * b.float().abs() + floor)).max()) for a, b in parts]
    return next((ratio for ratio in ratios if math.isnan(ratio)), max(ratios))
