"""Picture of the training curve: loss of each logged step, smoothed loss, and validation loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune_assets.reporting.pictures import blank, save

SMOOTHING = 0.8  # weight of the past in the running mean


def smooth(values: Sequence[float]) -> list[float]:
    """Return the exponential running mean, with bias correction at the start as in Adam."""
    running, smoothed = 0.0, []
    for count, value in enumerate(values, 1):
        running = SMOOTHING * running + (1 - SMOOTHING) * value
        smoothed.append(running / (1 - SMOOTHING**count))
    return smoothed


def draw(path: Path, losses: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]]) -> None:
    """Write a PNG of 640 x 400 pixels, well below 100 kB. The same numbers give the same bytes.

    Args:
        losses: (step, training loss in nats per learnt token).
        validation: (step, loss on the validation rows); may be empty.
    """
    figure, axes = blank()
    steps, values = [step for step, _ in losses], [loss for _, loss in losses]
    axes.plot(steps, values, color="#9ecae1", linewidth=1, label="training")
    axes.plot(steps, smooth(values), color="#08519c", linewidth=1.8, label="training, smoothed")
    if validation:
        axes.plot(
            [step for step, _ in validation], [loss for _, loss in validation],
            color="#d94801", linewidth=1.5, marker="o", markersize=4, label="validation",
        )  # fmt: skip
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, path)
