"""BLEU-4 and ROUGE have the same values as in LLaMA-Factory, without output or side effects."""

from __future__ import annotations

import difflib
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_assets.evaluation import metrics

pytestmark = pytest.mark.fast

# Made once with rouge_chinese 1.0.3, jieba 0.42.1 and nltk 3.10.4 by the formula of LLaMA-Factory's ComputeSimilarity:
# Rouge().get_scores(" ".join(jieba.cut(answer)), " ".join(jieba.cut(label)))[0][...]["f"], all zero if either text is
# blank, and sentence_bleu([list(label)], list(answer), smoothing_function=SmoothingFunction().method3); both
# round(100 * value, 4). 20,000 random texts of the like gave no difference either.
NUMBERS = [  # answer, label, bleu-4, rouge-1, rouge-2, rouge-l
    ("北京是中国的首都。", "中国的首都是北京。", 54.6633, 100.0, 40.0, 66.6667),
    (
        "我是小智，一个由云帆团队开发的人工智能助手。",
        "您好，我是小智，由云帆团队训练的人工智能助手，很高兴为您服务。",
        39.6003,
        74.0741,
        44.4444,
        68.9655,
    ),
    ("The capital of France is Paris.", "Paris is the capital of France.", 83.0239, 85.7143, 33.3333, 57.1429),
    ("the the the the cat", "the cat sat on the mat", 45.0414, 57.1429, 28.5714, 36.3636),
    ("Hello, world!", "Hello, world!", 100.0, 100.0, 100.0, 100.0),
    ("First.\n\nSecond？\n \nThird。", "First.\n\nThird。", 51.5563, 83.3333, 66.6667, 71.4286),
    ("好", "坏", 0.0, 0.0, 0.0, 0.0),
    ("", "anything", 0.0, 0.0, 0.0, 0.0),
    ("anything", "", 0.0, 0.0, 0.0, 0.0),
    ("  \n", "x", 0.0, 0.0, 0.0, 0.0),
    ("等等......然后呢?", "等等......后来呢?", 68.6589, 80.0, 50.0, 80.0),
    (
        "The rain in Spain stays mainly in the plain 西班牙的雨。",
        "In Spain 的雨 stays mainly in the plain. 雨雨雨",
        65.633,
        69.5652,
        45.4545,
        50.0,
    ),
]


NAMES = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")


@pytest.mark.parametrize(("answer", "label", "bleu", "rouge_1", "rouge_2", "rouge_l"), NUMBERS)
def test_the_numbers_are_llama_factorys(
    answer: str, label: str, bleu: float, rouge_1: float, rouge_2: float, rouge_l: float
) -> None:
    assert metrics.score(answer, label) == {
        "bleu-4": bleu, "rouge-1": rouge_1, "rouge-2": rouge_2, "rouge-l": rouge_l
    }  # fmt: skip


def test_the_mean_is_over_rows() -> None:
    rows = [metrics.score("Hello, world!", "Hello, world!"), metrics.score("好", "坏")]
    means = {name: metrics.mean_score(name, rows) for name in NAMES}
    assert means == dict.fromkeys(NAMES, 50.0)


TEXTS = st.text(st.sampled_from("我是小智能助手人工北京ab c.。？\n，"), max_size=40)


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS)
def test_scores_stay_in_range_and_rouge_is_symmetric(a: str, b: str) -> None:
    one, other = metrics.score(a, b), metrics.score(b, a)
    assert all(0 <= value <= 100 for value in one.values())
    assert all(one[name] == other[name] for name in ("rouge-1", "rouge-2", "rouge-l"))


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_the_expected_answer_itself_scores_best(text: str) -> None:
    scores = metrics.score(text, text)
    if len(text) >= 4:
        assert scores["bleu-4"] == 100
    if len(metrics.words(text)) >= 2:
        assert all(scores[name] == 100 for name in ("rouge-1", "rouge-2", "rouge-l"))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=30), st.lists(st.sampled_from("abcd"), max_size=30))
def test_longest_common_subsequence(a: list[str], b: list[str]) -> None:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
    assert metrics.longest_common_subsequence(a, b) == table[-1][-1]
    matching = sum(block.size for block in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks())
    assert metrics.longest_common_subsequence(a, b) >= matching


def test_jieba_is_quiet_and_leaves_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    metrics._segmenter.cache_clear()
    assert metrics.words("我是人工智能助手") == ["我", "是", "人工智能", "助手"]
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


class Jieba:
    """Our words, for Google's rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return metrics.words(text)


@given(
    st.permutations([*"信贷风险合规支付保", "bank", "loan", "risk"]),
    st.permutations([*"信贷银行合规", "bank", "card"]),
)
@settings(max_examples=50, deadline=None)
def test_rouge_is_that_of_another_implementation_where_no_word_is_repeated(
    answered: list[str], expected: list[str]
) -> None:
    """rouge-score counts repeated n-grams, we (as LLaMA-Factory) do not: without repetitions they must agree."""
    from rouge_score.rouge_scorer import RougeScorer

    answer, label = " ".join(answered[:9]), " ".join(expected)
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Jieba()).score(label, answer)
    ours = metrics.score(answer, label)
    for name, other in (("rouge-1", "rouge1"), ("rouge-2", "rouge2"), ("rouge-l", "rougeL")):
        assert ours[name] == pytest.approx(100 * theirs[other].fmeasure, abs=1e-3)
