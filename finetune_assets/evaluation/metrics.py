"""Table of metrics, and BLEU-4 and ROUGE-1/2/L for Chinese and English with the same values as in LLaMA-Factory.

Scores are computed per row, in percent, and averaged over the rows, so that they can be compared with LLaMA-Factory's.

- bleu-4: BLEU (Papineni et al. 2002) over characters up to 4-grams, nltk's `sentence_bleu` with smoothing method 3 of
  Chen and Cherry (2014).
- rouge-1, rouge-2, rouge-l: F1 of ROUGE (Lin 2004) over the words of jieba's segmentation, in English as in Chinese.

The package `rouge-score` does not fit: it counts each n-gram as often as it occurs, LLaMA-Factory counts it once. The
difference is a few points on repetitive answers. The package `evaluate` takes seconds to import and writes to the
user's cache.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from finetune_assets.evaluation.perplexity import NegativeLogLikelihood, add_up
from finetune_assets.evaluation.scored_row import Result

if TYPE_CHECKING:
    import jieba


@dataclass(frozen=True)
class Pair:
    """An answer and the label (the expected answer), as texts and as words."""

    answer: str
    label: str

    @cached_property
    def answer_words(self) -> list[str]:
        return words(self.answer)

    @cached_property
    def label_words(self) -> list[str]:
        return words(self.label)


@dataclass(frozen=True)
class Metric:
    """A figure of one model over rows of the test split.

    Attributes:
        name: its key in metrics.json.
        title: its name in tables for people, with an arrow to the better side; None: only programs read it.
        over: returns the figure for some rows; None where there is nothing to measure.
        score: returns the score of one answer, 0 to 1; None where the figure is not a mean of scores of answers.
        headline: whether short tables show it.
    """

    name: str
    title: str | None
    over: Callable[[Sequence[Result]], float | None]
    score: Callable[[Pair], float] | None = None
    headline: bool = False


def score(answer: str, label: str) -> dict[str, float]:
    """Return each score of one answer, 0 to 100 and rounded to 4 digits."""
    pair = Pair(answer, label)
    return {metric.name: round(100 * metric.score(pair), 4) for metric in METRICS.values() if metric.score is not None}


def mean_score(name: str, scores: Sequence[Mapping[str, float]]) -> float | None:
    """Return the mean of one score over rows, rounded to 4 digits; None without rows."""
    return round(sum(row[name] for row in scores) / len(scores), 4) if scores else None


def bleu4(answer: str, label: str) -> float:
    """Return sentence BLEU over characters, 0 to 1."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    if not answer:
        return 0.0
    with warnings.catch_warnings():
        # nltk warns where no n-gram of some length matches; the smoothing handles that.
        warnings.simplefilter("ignore", UserWarning)
        smoothing = SmoothingFunction().method3
        # nltk declares a list for several sets of weights; with the default weights it returns one number
        return float(sentence_bleu([list(label)], list(answer), smoothing_function=smoothing))  # type: ignore[arg-type]


def rouge_n(answer: Sequence[str], label: Sequence[str], n: int) -> float:
    """Return F1 of the distinct n-grams that two lists of words share, 0 to 1."""
    answered, expected = _ngrams(answer, n), _ngrams(label, n)
    return _f1(len(answered & expected), len(answered), len(expected))


def rouge_l(answer: Sequence[str], label: Sequence[str]) -> float:
    """Return F1 of the longest common subsequence of two lists of words, 0 to 1."""
    return _f1(longest_common_subsequence(answer, label), len(answer), len(label))


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Return its length, by a bit-parallel algorithm (Hyyrö 2004) that takes milliseconds for long answers."""
    positions: dict[str, int] = {}  # word -> its positions in `a`, as bits
    for position, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << position
    full = (1 << len(a)) - 1
    row = full  # a zero bit marks each position of `a` at which the subsequence grows by one
    for word in b:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()


def words(text: str) -> list[str]:
    """Return the words of a text as jieba segments it, with punctuation and without spaces.

    LLaMA-Factory's scorer splits the words into lines at sentence ends and counts a blank line as an empty word. This
    function does the same, since texts with blank lines would otherwise score differently.
    """
    joined = " ".join(_segmenter().cut(text))
    if not joined.strip():
        return []
    lines = _SIX_DOTS.sub(r"\1\n\2", _SENTENCE_END.sub(r"\1\n\2", joined)).rstrip().split("\n")
    return [word for line in lines if line for word in line.split() or [""]]


_SENTENCE_END = re.compile(r"([。！？?])([^”’])")
_SIX_DOTS = re.compile(r"(\.{6})([^”’])")


def _ngrams(items: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(items[start : start + n]) for start in range(len(items) - n + 1)}


def _f1(common: int, answered: int, expected: int) -> float:
    precision = common / answered if answered else 0.0
    recall = common / expected if expected else 0.0
    return 2 * precision * recall / (precision + recall + 1e-8)


@functools.cache
def _segmenter() -> jieba.Tokenizer:
    """Return jieba with its dictionary; this takes half a second the first time.

    jieba itself would read and write a cache under a fixed name in the shared temporary folder, where anyone could
    leave a forged one, and would log it. So the dictionary is loaded here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its source has escape sequences that newer Pythons warn about
        import jieba
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer


def _mean_of(name: str, title: str, score: Callable[[Pair], float]) -> Metric:
    """Return the metric that is the mean of a score over the rows that got an answer."""

    def over(results: Sequence[Result]) -> float | None:
        return mean_score(name, [result.scores for result in results if result.scores is not None])

    return Metric(name, title, over, score, headline=True)


def _ended(results: Sequence[Result]) -> float | None:
    """Return the share of answers that ended by themselves."""
    ended = [result.answer.ended for result in results if result.answer is not None]
    return round(sum(ended) / len(ended), 4) if ended else None


def _total(results: Sequence[Result]) -> NegativeLogLikelihood:
    return add_up([result.likelihood for result in results])


def _nll(results: Sequence[Result]) -> float | None:
    return round(total.mean, 6) if (total := _total(results)).tokens else None


def _perplexity(results: Sequence[Result]) -> float | None:
    return round(total.perplexity, 4) if (total := _total(results)).tokens else None


# Add a metric here: metrics.json, in this order, predictions.jsonl and the tables for people follow.
METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        _mean_of("bleu-4", "BLEU-4 ↑", lambda pair: bleu4(pair.answer, pair.label)),
        _mean_of("rouge-1", "ROUGE-1 ↑", lambda pair: rouge_n(pair.answer_words, pair.label_words, 1)),
        _mean_of("rouge-2", "ROUGE-2 ↑", lambda pair: rouge_n(pair.answer_words, pair.label_words, 2)),
        _mean_of("rouge-l", "ROUGE-L ↑", lambda pair: rouge_l(pair.answer_words, pair.label_words)),
        Metric("ended", "answers that end by themselves ↑", _ended),
        Metric("nll", None, _nll),
        Metric("perplexity", "perplexity ↓", _perplexity, headline=True),
        Metric("tokens", None, lambda results: _total(results).tokens),
    )
}
HEADLINES = tuple(metric.name for metric in METRICS.values() if metric.headline)
