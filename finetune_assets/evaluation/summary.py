"""Summary of an evaluation: metrics.json, predictions.jsonl, and the table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune_assets.evaluation.metrics import METRICS
from finetune_assets.evaluation.scored_row import SIDES, Result, ScoredRow

COMPARED = (
    "base model and base model + adapter, both with the adapter's chat template and default system prompt; "
    "greedy answers to the last turn of each row"
)


def summarise(rows: Sequence[ScoredRow], max_new_tokens: int) -> dict[str, Any]:
    """Return what metrics.json holds: both models over all rows, and over those of each data set."""
    by_dataset: dict[str, list[ScoredRow]] = {}
    for row in rows:
        by_dataset.setdefault(row.row["dataset"], []).append(row)
    datasets = {name: _block(by_dataset[name]) for name in sorted(by_dataset)}
    return {"compared": COMPARED, "max_new_tokens": max_new_tokens, **_block(rows), "datasets": datasets}


def _block(rows: Sequence[ScoredRow]) -> dict[str, Any]:
    results = {side: [row.results[side] for row in rows] for side in SIDES}
    answered = sum(result.answer is not None for result in results["base"])
    figures = {side: {metric.name: metric.over(results[side]) for metric in METRICS.values()} for side in SIDES}
    return {"rows": len(rows), "answered": answered, **figures}


def prediction(scored: ScoredRow) -> dict[str, Any]:
    """Return a line of predictions.jsonl: the question, the expected answer, and the result of each model."""
    row = scored.row
    return {
        "id": row["id"],
        "dataset": row["dataset"],
        "messages": row["messages"][:-1],
        "label": row["messages"][-1]["content"],
        **{side: _result(scored.results[side]) for side in SIDES},
    }


def _result(result: Result) -> dict[str, Any]:
    return {
        "answer": None if result.answer is None else result.answer.text,
        "ended": None if result.answer is None else result.answer.ended,
        "scores": result.scores,
        "nll": round(result.likelihood.mean, 6) if result.likelihood.tokens else None,
    }


def table(metrics: dict[str, Any]) -> str:
    """Return the metrics as a Markdown table: all rows first, then each data set; headline metrics first."""
    lines = [
        "| rows | measure | base | tuned | change |",
        "|---|---|---:|---:|---:|",
    ]
    shown = sorted((metric for metric in METRICS.values() if metric.title), key=lambda metric: not metric.headline)
    blocks = {"all": metrics, **(metrics["datasets"] if len(metrics["datasets"]) > 1 else {})}
    for name, block in blocks.items():
        label = f"{name.replace('|', chr(92) + '|')} ({block['rows']})"
        for metric in shown:
            before, after = (block[side][metric.name] for side in SIDES)
            if before is None or after is None:
                continue
            lines.append(f"| {label} | {metric.title} | {before:.2f} | {after:.2f} | {after - before:+.2f} |")
            label = ""
    return "\n".join(lines) + "\n"
