"""Base against tuned model on the test rows: the same questions, the same chat template, the same measures.

What is compared: the base model, and the base model with the adapter. Both get the conversation rendered by the chat
template that the adapter was trained with, and the same default system prompt, so that the difference is what the
training did. Answers are greedy.
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
from finetune_assets.evaluation.metrics import METRICS, mean_scores, score
from finetune_assets.evaluation.perplexity import Surprise, add_up, surprise
from finetune_assets.models.loading import Chat, context_length, load_chat, load_model
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.reporting.events import Progress, StepProgress, silent

if TYPE_CHECKING:
    from finetune_assets.machine.device import Device
    from finetune_assets.recipe import EvaluateSection

COMPARED = (
    "base model and base model + adapter, both with the adapter's chat template and default system prompt; "
    "greedy answers to the last turn of each row"
)


@dataclass(frozen=True)
class _Work:
    """What both models are asked to do.

    Attributes:
        rows: the test rows, and of each:
        encoded: ids and labels of the whole conversation;
        prompts: ids of all but the last answer.
        answered: numbers of the rows that get an answer.
    """

    rows: list[SplitRow]
    encoded: list[Encoded]
    prompts: list[list[int]]
    answered: list[int]


@dataclass(frozen=True)
class _Side:
    """What one of the two models did.

    Attributes:
        answers, scores: by the number of the row; not every row gets an answer.
        surprises: of each row.
        generating: seconds that the answers took.
    """

    answers: dict[int, Answer]
    scores: dict[int, dict[str, float]]
    surprises: list[Surprise]
    generating: float


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

    Perplexity is measured on every test row; answers are generated to `max_samples` of them, drawn by their ids, from
    all data sets alike. Rows that leave no room for an answer in the model's context get none, and are counted.

    Args:
        base: the base model's folder.
        adapter: the adapter's folder, with tokenizer and chat.json.
        test: test.jsonl.
        out: an existing folder.
        train: train.jsonl; if given, it is made sure that it shares no row with `test`.
        cutoff_len: tokens of a row that count towards perplexity, as in training.
        progress: is called with a `StepProgress` for each batch of rows.

    Returns:
        what metrics.json holds, and "seconds", "samples_per_second" (answers of both models) and "samples"
        (a handful of questions and answers), which depend on the machine or would only repeat predictions.jsonl.

    Raises:
        StepFailed: no test rows, test rows among the training rows, or a model that cannot be loaded.
    """
    started = time.monotonic()
    rows = read_split(test)
    if not rows:
        raise StepFailed(
            f"{test}: there are no test rows, so there is nothing to score the model on",
            "raise dataset.test_size in the recipe (0.05 sets one row in twenty aside), or add more data",
        )
    if train is not None:
        _assert_unseen(rows, read_split(train), test, train)
    chat = load_chat(adapter, trust_remote_code=trust_remote_code)
    model = load_model(base, adapter, device, trust_remote_code=trust_remote_code)
    encoded = [
        encode_row(chat.tokenizer, row["messages"], default_system=chat.default_system, cutoff_len=cutoff_len)
        for row in rows
    ]
    prompts = [encode_prompt(chat.tokenizer, row["messages"][:-1], default_system=chat.default_system) for row in rows]
    chosen = _draw(rows, evaluate.max_samples)
    room = context_length(model)
    fit = [place for place in chosen if room is None or len(prompts[place]) + evaluate.max_new_tokens <= room]
    work = _Work(rows, encoded, prompts, fit)
    tick = _ticker(progress, 2 * (len(rows) + len(fit)), started)
    sides: dict[str, _Side] = {}
    with model.disable_adapter():
        sides["base"] = _measure("base", model, chat, work, evaluate, tick)
    sides["tuned"] = _measure("tuned", model, chat, work, evaluate, tick)
    metrics = _summary(work, sides, evaluate.max_new_tokens)
    metrics["skipped_too_long"] = len(chosen) - len(fit)
    predictions = [_prediction(row, place, sides) for place, row in enumerate(rows)]
    _write(out / "predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions))
    _write(out / "metrics.json", json.dumps(metrics, ensure_ascii=False, indent=2) + "\n")
    generating = sum(side.generating for side in sides.values())
    return {
        **metrics,
        "seconds": round(time.monotonic() - started, 2),
        "samples_per_second": round(2 * len(fit) / generating, 3) if fit else None,
        "samples": [predictions[place] for place in fit[:5]],
    }


def _measure(
    name: str, model: Any, chat: Chat, work: _Work, section: EvaluateSection, tick: Callable[[int, str], None]
) -> _Side:
    """The model's surprise at all rows, and its answers to those that get one."""
    surprises = surprise(model, work.encoded, done=lambda count: tick(count, f"{name}: perplexity"))
    since = time.monotonic()
    given = generate(
        model,
        chat,
        [work.prompts[place] for place in work.answered],
        max_new_tokens=section.max_new_tokens,
        batch_size=section.per_device_eval_batch_size,
        done=lambda count: tick(count, f"{name}: answers"),
    )
    generating = time.monotonic() - since
    answers = dict(zip(work.answered, given, strict=True))
    scores = {place: score(said.text, work.rows[place]["messages"][-1]["content"]) for place, said in answers.items()}
    return _Side(answers, scores, surprises, generating)


def _summary(work: _Work, sides: dict[str, _Side], max_new_tokens: int) -> dict[str, Any]:
    """metrics.json: both models over all rows, and over those of each data set."""
    of: dict[str, list[int]] = {}
    for place, row in enumerate(work.rows):
        of.setdefault(row["dataset"], []).append(place)
    answered = set(work.answered)

    def block(places: list[int]) -> dict[str, Any]:
        numbers = {name: _numbers(side, places) for name, side in sides.items()}
        return {"rows": len(places), "answered": len(answered.intersection(places)), **numbers}

    datasets = {name: block(of[name]) for name in sorted(of)}
    every = block(list(range(len(work.rows))))
    return {"compared": COMPARED, "max_new_tokens": max_new_tokens, **every, "datasets": datasets}


def _numbers(side: _Side, places: Sequence[int]) -> dict[str, float | int | None]:
    """One model's figures over some rows; None where there is nothing to take the mean of."""
    total = add_up([side.surprises[place] for place in places])
    scores = [side.scores[place] for place in places if place in side.scores]
    ended = [side.answers[place].ended for place in places if place in side.answers]
    return {
        **(mean_scores(scores) if scores else dict.fromkeys(METRICS)),
        "ended": round(sum(ended) / len(ended), 4) if ended else None,
        "nll": round(total.mean, 6) if total.tokens else None,
        "perplexity": round(total.perplexity, 4) if total.tokens else None,
        "tokens": total.tokens,
    }


def _prediction(row: SplitRow, place: int, sides: dict[str, _Side]) -> dict[str, Any]:
    """A line of predictions.jsonl: the question, the expected answer, and what each model made of it."""
    line: dict[str, Any] = {
        "id": row["id"],
        "dataset": row["dataset"],
        "messages": row["messages"][:-1],
        "label": row["messages"][-1]["content"],
    }
    for name, side in sides.items():
        answer, found = side.answers.get(place), side.surprises[place]
        line[name] = {
            "answer": None if answer is None else answer.text,
            "ended": None if answer is None else answer.ended,
            "scores": side.scores.get(place),
            "nll": round(found.mean, 6) if found.tokens else None,
        }
    return line


def table(metrics: dict[str, Any]) -> str:
    """The metrics as a Markdown table for people: all rows first, then each data set."""
    lines = [
        "| rows | measure | base | tuned | change |",
        "|---|---|---:|---:|---:|",
    ]
    blocks = {"all": metrics, **(metrics["datasets"] if len(metrics["datasets"]) > 1 else {})}
    for name, block in blocks.items():
        label = f"{name.replace('|', chr(92) + '|')} ({block['rows']})"
        for key, words in _MEASURES.items():
            before, after = block["base"][key], block["tuned"][key]
            if before is None or after is None:
                continue
            lines.append(f"| {label} | {words} | {before:.2f} | {after:.2f} | {after - before:+.2f} |")
            label = ""
    return "\n".join(lines) + "\n"


_MEASURES = {
    "bleu-4": "BLEU-4 ↑",
    "rouge-1": "ROUGE-1 ↑",
    "rouge-2": "ROUGE-2 ↑",
    "rouge-l": "ROUGE-L ↑",
    "perplexity": "perplexity ↓",
    "ended": "answers that end by themselves ↑",
}


def _draw(rows: Sequence[SplitRow], count: int | None) -> list[int]:
    """`count` rows (all if None), by the digest of their ids: the same ones however the file is ordered."""
    places = range(len(rows))
    if count is None or count >= len(rows):
        return list(places)
    return sorted(sorted(places, key=lambda p: (hashlib.sha256(rows[p]["id"].encode()).digest(), p))[:count])


def _assert_unseen(test_rows: list[SplitRow], train_rows: list[SplitRow], test: Path, train: Path) -> None:
    shared = sorted({row["id"] for row in test_rows} & {row["id"] for row in train_rows})
    if shared:
        more = f" and {len(shared) - 5} more" if len(shared) > 5 else ""
        raise StepFailed(
            f"{len(shared)} rows of {test} are in {train} too: {', '.join(shared[:5])}{more}",
            "scores on rows that were trained on mean nothing: make the split again (materialise dataset_info)",
        )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _ticker(progress: Progress, steps: int, started: float) -> Callable[[int, str], None]:
    """Counts rows of work and passes them on as progress events."""
    step = 0

    def tick(count: int, what: str) -> None:
        nonlocal step
        step += count
        seconds = round(time.monotonic() - started, 2)
        progress(StepProgress(step=step, steps=steps, what=what, seconds=seconds))

    return tick
