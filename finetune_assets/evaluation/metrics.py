"""BLEU-4 and ROUGE-1/2/L for Chinese and English, with the numbers that LLaMA-Factory gives.

They mean the same here as there, so that scores can be compared: per row, in percent, and then the mean over the rows.

- bleu-4: BLEU (Papineni et al. 2002) over characters up to 4-grams, nltk's `sentence_bleu` with smoothing method 3 of
  Chen and Cherry (2014).
- rouge-1, rouge-2, rouge-l: F1 of ROUGE (Lin 2004) over the words that jieba finds, in English as in Chinese.

Why not the `rouge-score` package with a tokenizer of our own: it counts each n-gram as often as it occurs, the numbers
to compare with count it once. The difference is a few points on answers that repeat themselves. And why not through
`evaluate`: importing it takes seconds, and its metrics make folders in the user's cache, for a few lines of arithmetic.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jieba

METRICS = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")


def score(answer: str, label: str) -> dict[str, float]:
    """The four metrics of one answer against the expected one, each 0 to 100 and rounded to 4 digits."""
    said, expected = words(answer), words(label)
    return {
        "bleu-4": round(100 * bleu4(answer, label), 4),
        "rouge-1": round(100 * rouge_n(said, expected, 1), 4),
        "rouge-2": round(100 * rouge_n(said, expected, 2), 4),
        "rouge-l": round(100 * rouge_l(said, expected), 4),
    }


def mean_scores(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the rows, which are not empty; rounded to 4 digits."""
    return {name: round(sum(row[name] for row in rows) / len(rows), 4) for name in METRICS}


def bleu4(answer: str, label: str) -> float:
    """Sentence BLEU over characters, 0 to 1."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    if not answer:
        return 0.0
    with warnings.catch_warnings():
        # It warns where no n-gram of some length matches, the very thing that the smoothing is for.
        warnings.simplefilter("ignore", UserWarning)
        smoothing = SmoothingFunction().method3
        # nltk declares a tuple of weights for several BLEUs at once; with its defaults it gives one number
        return float(sentence_bleu([list(label)], list(answer), smoothing_function=smoothing))  # type: ignore[arg-type]


def rouge_n(answer: Sequence[str], label: Sequence[str], n: int) -> float:
    """F1 of the different n-grams that two lists of words share, 0 to 1."""
    said, expected = _ngrams(answer, n), _ngrams(label, n)
    return _f1(len(said & expected), len(said), len(expected))


def rouge_l(answer: Sequence[str], label: Sequence[str]) -> float:
    """F1 of the longest common subsequence of two lists of words, 0 to 1."""
    return _f1(longest_common_subsequence(answer, label), len(answer), len(label))


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Its length; bit-parallel (Hyyrö 2004), so that long answers take milliseconds."""
    where: dict[str, int] = {}
    for place, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << place
    full = (1 << len(a)) - 1
    row = full  # a zero bit marks each place of `a` where the subsequence so far grows by one
    for word in b:
        matches = row & where.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()


def words(text: str) -> list[str]:
    """The text's words as jieba cuts it, punctuation included, white space not.

    The numbers to compare with come from a scorer that cuts the words into lines at sentence ends, and takes a line of
    nothing but white space for an empty word; so it is here, or texts with blank lines would score differently.
    """
    joined = " ".join(_segmenter().cut(text))
    if not joined.strip():
        return []
    lines = _SIX_DOTS.sub(r"\1\n\2", _SENTENCE_END.sub(r"\1\n\2", joined)).rstrip().split("\n")
    return [word for line in lines if line for word in line.split() or [""]]


_SENTENCE_END = re.compile(r"([。！？?])([^”’])")
_SIX_DOTS = re.compile(r"(\.{6})([^”’])")


def _ngrams(of: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(of[start : start + n]) for start in range(len(of) - n + 1)}


def _f1(common: int, said: int, expected: int) -> float:
    precision = common / said if said else 0.0
    recall = common / expected if expected else 0.0
    return 2 * precision * recall / (precision + recall + 1e-8)


@functools.cache
def _segmenter() -> jieba.Tokenizer:
    """jieba with its dictionary; half a second the first time.

    Filled here rather than by jieba itself, which reads and writes a cache under a fixed name in the shared temporary
    folder, where anyone could leave a forged one, and logs while it does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its source has escape sequences that newer Pythons complain about
        import jieba
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer
