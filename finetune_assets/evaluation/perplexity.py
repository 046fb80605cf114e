"""Negative log-likelihood and perplexity of the expected answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_assets.chat.template import IGNORED, Encoded
from finetune_assets.models.decoding import left_padded

# Tokens of a batch, padding included. Bounds the memory of the logits: this number times the vocabulary, in fp32.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """Negative log-likelihood of the answer tokens of one row, or of several rows.

    Attributes:
        nll: in nats, the sum over the tokens.
        tokens: answer tokens, each predicted from all tokens before it.
    """

    nll: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(mean): from 1 (certain) to the size of the vocabulary (guessing)."""
        return math.exp(self.mean)


def negative_log_likelihoods(
    model: Any, rows: Sequence[Encoded], *, done: Callable[[int], None] = lambda rows: None
) -> list[NegativeLogLikelihood]:
    """Return the negative log-likelihood of the labels of each row, in the order of the rows.

    A long row is a batch alone; short rows share one. Rows are padded on the left, so that the answers are aligned at
    the end, and logits are computed only at the positions that predict a label.

    Args:
        rows: from `encode_row`.
        done: is called after each batch with the number of rows in it.
    """
    import torch

    result: dict[int, NegativeLogLikelihood] = {}
    for numbers in _batches([len(row.input_ids) for row in rows]):
        batch = left_padded([rows[number].input_ids for number in numbers], model.device)
        longest = batch["input_ids"].shape[1]
        padded = [[IGNORED] * (longest - len(rows[number].labels)) + list(rows[number].labels) for number in numbers]
        for number, labels in zip(numbers, padded, strict=True):
            labels[longest - len(rows[number].labels)] = IGNORED  # no token precedes the first one
        positions = [p for p in range(1, longest) if any(labels[p] != IGNORED for labels in padded)]
        if positions:
            keep = torch.tensor([p - 1 for p in positions], device=model.device)  # the logits at t - 1 are those of t
            with torch.inference_mode():
                logits = model(**batch, use_cache=False, logits_to_keep=keep).logits
                targets = torch.tensor([[labels[p] for p in positions] for labels in padded], device=model.device)
                losses = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
                ).view(targets.shape)
                sums = losses.double().sum(-1) if losses.device.type != "mps" else losses.sum(-1)  # mps has no float64
            counts = (targets != IGNORED).sum(-1)
            for number, nll, tokens in zip(numbers, sums.tolist(), counts.tolist(), strict=True):
                result[number] = NegativeLogLikelihood(nll, tokens)
        else:
            result.update({number: NegativeLogLikelihood(0.0, 0) for number in numbers})
        done(len(numbers))
    return [result[number] for number in range(len(rows))]


def add_up(parts: Sequence[NegativeLogLikelihood]) -> NegativeLogLikelihood:
    """Return the negative log-likelihood of all rows together."""
    return NegativeLogLikelihood(math.fsum(part.nll for part in parts), sum(part.tokens for part in parts))


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield batches of row numbers, longest rows first, each within `BATCH_TOKENS` or of one row."""
    waiting = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    while waiting:
        size = max(1, BATCH_TOKENS // max(1, lengths[waiting[0]]))
        yield waiting[:size]
        waiting = waiting[size:]
