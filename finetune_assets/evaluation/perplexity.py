"""Negative log-likelihood and perplexity of the expected answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_assets.chat.template import IGNORED, Encoded
from finetune_assets.models.decoding import left_padded

# Tokens of a batch, padding included. Bounds the logits: at most this many times the vocabulary, in fp32.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """Negative log-likelihood of the answer tokens of one row, or of several rows.

    Attributes:
        nll: in nats, the sum over the tokens.
        tokens: answer tokens, each predicted from all that comes before it.
    """

    nll: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(mean): 1 is certainty, the vocabulary's size is guessing."""
        return math.exp(self.mean)


def negative_log_likelihoods(
    model: Any, rows: Sequence[Encoded], *, done: Callable[[int], None] = lambda rows: None
) -> list[NegativeLogLikelihood]:
    """Return the negative log-likelihood of the labels of each row, in the order of the rows.

    A long row makes a batch of its own; short ones share one. Logits are computed from the first label of a batch
    only: rows are padded on the left, so that the answers stand together at the end.

    Args:
        rows: as `encode_row` gives them.
        done: told after each batch how many rows are done.
    """
    import torch

    result: dict[int, NegativeLogLikelihood] = {}
    for places in _batches([len(row.input_ids) for row in rows]):
        batch = left_padded([rows[place].input_ids for place in places], model.device)
        longest = batch["input_ids"].shape[1]
        padded = [[IGNORED] * (longest - len(rows[p].labels)) + list(rows[p].labels) for p in places]
        for place, labels in zip(places, padded, strict=True):
            labels[longest - len(rows[place].labels)] = IGNORED  # nothing comes before the first token
        wanted = [at for at in range(1, longest) if any(labels[at] != IGNORED for labels in padded)]
        if wanted:
            keep = torch.tensor([at - 1 for at in wanted], device=model.device)  # the logits at t - 1 are those of t
            with torch.inference_mode():
                logits = model(**batch, use_cache=False, logits_to_keep=keep).logits
                targets = torch.tensor([[labels[at] for at in wanted] for labels in padded], device=model.device)
                losses = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
                ).view(targets.shape)
                sums = losses.double().sum(-1) if losses.device.type != "mps" else losses.sum(-1)  # mps has no float64
            counts = (targets != IGNORED).sum(-1)
            for place, nll, tokens in zip(places, sums.tolist(), counts.tolist(), strict=True):
                result[place] = NegativeLogLikelihood(nll, tokens)
        else:
            result.update({place: NegativeLogLikelihood(0.0, 0) for place in places})
        done(len(places))
    return [result[place] for place in range(len(rows))]


def add_up(parts: Sequence[NegativeLogLikelihood]) -> NegativeLogLikelihood:
    """Return the negative log-likelihood of all rows together."""
    return NegativeLogLikelihood(math.fsum(part.nll for part in parts), sum(part.tokens for part in parts))


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Row numbers by length, the longest first, as many at a time as fit into `BATCH_TOKENS`; one at least."""
    waiting = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    while waiting:
        size = max(1, BATCH_TOKENS // max(1, lengths[waiting[0]]))
        yield waiting[:size]
        waiting = waiting[size:]
