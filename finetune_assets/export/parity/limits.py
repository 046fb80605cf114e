"""Limits of the divergence of a GGUF file from its merged model, and the figures that are held against them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from finetune_assets.export.parity.checks.failure import Failure

# Largest mean KL, in nats per token, at which a file still counts as the merged model. How they were found, and why a
# file of the right weights may be beyond its limit: docs/decisions.md#limits-of-the-kl-divergence-of-gguf-types
MAX_KL = {
    "f32": 0.003, "f16": 0.003, "bf16": 0.005, "q8_0": 0.02, "q6_k": 0.05, "q5_k_m": 0.25, "q5_k_s": 0.25,
    "q5_1": 0.25, "q5_0": 0.25, "q4_k_m": 0.3, "q4_k_s": 0.3, "q4_1": 0.5, "q4_0": 0.5, "q3_k_l": 0.75, "q3_k_m": 0.75,
    "q3_k_s": 1.0, "q2_k": 2.0,
}  # fmt: skip
NEAR_THE_BASE = 0.5  # of what training changed: beyond that quantisation error, a file may answer as the base does
HALF_PRECISION = 0.005  # what a merged model computed in bf16 or fp16 adds by its own rounding (0.001 for 135M)


@dataclass(frozen=True)
class Figures:
    """Figures of the distance between a GGUF file and the merged model.

    Attributes:
        kl: mean KL(merged || GGUF) of the next token, nats.
        top1: top-1 agreement: share of the points at which both find the same token likeliest.
        ppl_ratio: perplexity of the GGUF at the points, divided by the merged model's.
        tokens_per_second: of decoding here, for information.
        points: positions compared.
        reference: precision of the merged model's computation.
    """

    kl: float
    top1: float
    ppl_ratio: float
    tokens_per_second: float
    points: int
    reference: str


def largest_kl(kind: str, reference: str, max_kl: Mapping[str, float]) -> float:
    """Return the largest mean KL divergence of a type that passes, in nats per token.

    Args:
        reference: precision of the merged model's computation.
        max_kl: type -> limit of the recipe, in place of `MAX_KL`.
    """
    return max_kl.get(kind, MAX_KL[kind] + (0 if reference == "fp32" else HALF_PRECISION))


def judge(kind: str, figures: Figures, max_kl: Mapping[str, float]) -> list[Failure]:
    """Return the failure of the check `kl` if a type's KL is above its limit."""
    allowed = largest_kl(kind, figures.reference, max_kl)
    if figures.kl <= allowed:  # false for a non-finite KL, too
        return []
    return [Failure("kl", f"mean KL divergence {figures.kl:.4g} nats per token", f"{allowed:g}")]


def near_the_base(kl: Mapping[str, float], changed: float) -> list[str]:
    """Return a warning for each type whose quantisation error is large compared with what training changed.

    Args:
        kl: type -> mean KL(merged || GGUF), nats.
        changed: mean KL(merged || base), nats.
    """
    return [
        f"{kind}: its quantisation error ({much:.2g} nats per token) is large compared with what training changed "
        f"({changed:.2g}): ask the file questions that training taught"
        for kind, much in kl.items()
        if much > NEAR_THE_BASE * changed
    ]
