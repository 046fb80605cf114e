"""Evaluation of the base model and of the base model with the adapter, on the rows of the test split.

Both models read the same conversations, with the chat template and the default system prompt of the adapter. The
difference between their scores is therefore the effect of training. Answers are greedy.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.chat.template import Encoded, encode_prompt, encode_row
from finetune_assets.data.rows import SplitRow, read_split
from finetune_assets.evaluation.generate import Answer, generate
from finetune_assets.evaluation.metrics import score
from finetune_assets.evaluation.perplexity import NegativeLogLikelihood, negative_log_likelihoods
from finetune_assets.evaluation.scored_row import Result, ScoredRow
from finetune_assets.evaluation.summary import prediction, summarise
from finetune_assets.models.loading import Chat, context_length, load_chat, load_model
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.reporting.events import Progress, StepProgress, silent

if TYPE_CHECKING:
    from finetune_assets.machine.device import Device
    from finetune_assets.recipe import EvaluateSection


@dataclass(frozen=True)
class _Question:
    """A test row as both models get it.

    Attributes:
        encoded: ids and labels of the whole conversation.
        prompt: ids of all but the last answer.
        drawn: whether it is among the rows to answer.
        fits: whether the model's context leaves room for an answer.
    """

    row: SplitRow
    encoded: Encoded
    prompt: list[int]
    drawn: bool
    fits: bool

    @property
    def answered(self) -> bool:
        return self.drawn and self.fits


def evaluate(
    base: Path,
    adapter: Path,
    test: Path,
    out: Path,
    *,
    evaluate: EvaluateSection,
    device: Device,
    train: Path | None = None,
    cutoff_len: int = 2048,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Score both models; write metrics.json and predictions.jsonl into `out`.

    Perplexity is measured on every test row. Answers are generated for `max_samples` rows, drawn by their ids from
    all data sets alike. A row that leaves no room for an answer in the model's context gets none, and is counted.

    Args:
        base: the base model's folder.
        adapter: the adapter's folder, with tokenizer and chat.json.
        test: test.jsonl.
        out: an existing folder.
        train: train.jsonl; if given, it must not share a row with `test`.
        cutoff_len: longest row in tokens, as in training; perplexity ignores the tokens after it.
        progress: is called with a `StepProgress` for each batch of rows.

    Returns:
        the content of metrics.json, and three figures that are not written: "seconds", "samples_per_second" (answers
        of both models), and "samples" (the first five answered lines of predictions.jsonl).

    Raises:
        StepFailed: there are no test rows, a test row is in the train split, or a model cannot be loaded.
    """
    started = time.monotonic()
    rows = read_split(test)
    if not rows:
        raise StepFailed(
            f"cannot evaluate: {test} has no rows",
            "raise dataset.test_size in the recipe (0.05 holds out one row in twenty), or add more data",
        )
    if train is not None:
        _assert_unseen(rows, read_split(train), test, train)
    chat = load_chat(adapter, trust_remote_code=trust_remote_code)
    model = load_model(base, adapter, device, trust_remote_code=trust_remote_code)
    questions = _questions(rows, chat, evaluate, cutoff_len, context_length(model))
    answered = sum(question.answered for question in questions)
    tick = _ticker(progress, 2 * (len(rows) + answered), started)
    with model.disable_adapter():
        base_results, base_seconds = _measure("base", model, chat, questions, evaluate, tick)
    tuned_results, tuned_seconds = _measure("tuned", model, chat, questions, evaluate, tick)
    scored = [
        ScoredRow(row, {"base": base_result, "tuned": tuned_result})
        for row, base_result, tuned_result in zip(rows, base_results, tuned_results, strict=True)
    ]
    metrics = summarise(scored, evaluate.max_new_tokens)
    metrics["skipped_too_long"] = sum(question.drawn and not question.fits for question in questions)
    predictions = [prediction(row) for row in scored]
    _write(out / "predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions))
    _write(out / "metrics.json", json.dumps(metrics, ensure_ascii=False, indent=2) + "\n")
    samples = [line for line, question in zip(predictions, questions, strict=True) if question.answered]
    return {
        **metrics,
        "seconds": round(time.monotonic() - started, 2),
        "samples_per_second": round(2 * answered / (base_seconds + tuned_seconds), 3) if answered else None,
        "samples": samples[:5],
    }


def _questions(
    rows: Sequence[SplitRow], chat: Chat, section: EvaluateSection, cutoff_len: int, room: int | None
) -> list[_Question]:
    drawn = _draw(rows, section.max_samples)
    questions: list[_Question] = []
    for number, row in enumerate(rows):
        messages, system = row["messages"], chat.default_system
        encoded = encode_row(chat.tokenizer, messages, default_system=system, cutoff_len=cutoff_len)
        prompt = encode_prompt(chat.tokenizer, messages[:-1], default_system=system)
        fits = room is None or len(prompt) + section.max_new_tokens <= room
        questions.append(_Question(row, encoded, prompt, number in drawn, fits))
    return questions


def _measure(
    name: str,
    model: Any,
    chat: Chat,
    questions: Sequence[_Question],
    section: EvaluateSection,
    tick: Callable[[int, str], None],
) -> tuple[list[Result], float]:
    """Return one model's result on each row, and the seconds that its answers took."""
    likelihoods = negative_log_likelihoods(
        model, [question.encoded for question in questions], done=lambda count: tick(count, f"{name}: perplexity")
    )
    since = time.monotonic()
    answers = iter(
        generate(
            model,
            chat,
            [question.prompt for question in questions if question.answered],
            max_new_tokens=section.max_new_tokens,
            batch_size=section.per_device_eval_batch_size,
            done=lambda count: tick(count, f"{name}: answers"),
        )
    )
    seconds = time.monotonic() - since
    results = [
        _result(question, next(answers) if question.answered else None, likelihood)
        for question, likelihood in zip(questions, likelihoods, strict=True)
    ]
    return results, seconds


def _result(question: _Question, answer: Answer | None, likelihood: NegativeLogLikelihood) -> Result:
    scores = None if answer is None else score(answer.text, question.row["messages"][-1]["content"])
    return Result(answer, scores, likelihood)


def _draw(rows: Sequence[SplitRow], count: int | None) -> set[int]:
    """Return the numbers of `count` rows (all if None), by the digest of their ids: whatever the order of the file."""

    def rank(number: int) -> tuple[bytes, int]:
        return hashlib.sha256(rows[number]["id"].encode()).digest(), number

    return set(sorted(range(len(rows)), key=rank)[:count])


def _assert_unseen(test_rows: list[SplitRow], train_rows: list[SplitRow], test: Path, train: Path) -> None:
    shared = sorted({row["id"] for row in test_rows} & {row["id"] for row in train_rows})
    if shared:
        more = f" and {len(shared) - 5} more" if len(shared) > 5 else ""
        raise StepFailed(
            f"{len(shared)} rows of {test} are also in {train}: {', '.join(shared[:5])}{more}",
            "materialise dataset_info again; scores on rows of the train split mean nothing",
        )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _ticker(progress: Progress, steps: int, started: float) -> Callable[[int, str], None]:
    """Return a function that counts finished rows and reports them as progress events."""
    step = 0

    def tick(count: int, what: str) -> None:
        nonlocal step
        step += count
        seconds = round(time.monotonic() - started, 2)
        progress(StepProgress(step=step, steps=steps, what=what, seconds=seconds))

    return tick
