"""Results of both models on one row of the test split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from finetune_assets.data.rows import SplitRow
from finetune_assets.evaluation.generate import Answer
from finetune_assets.evaluation.perplexity import NegativeLogLikelihood

SIDES = ("base", "tuned")


@dataclass(frozen=True)
class Result:
    """Result of one model on one row.

    Attributes:
        answer: None if the row got none.
        scores: metric -> score of the answer; None without an answer.
        likelihood: of the expected answers of the row.
    """

    answer: Answer | None
    scores: Mapping[str, float] | None
    likelihood: NegativeLogLikelihood


@dataclass(frozen=True)
class ScoredRow:
    """A test row and the result of each of `SIDES` on it."""

    row: SplitRow
    results: Mapping[str, Result]
