"""Size against divergence of a model's GGUF types, as a small picture: what each megabyte buys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from finetune_assets.reporting.pictures import blank, save

LEAST = 1e-7  # nats: a type that cannot be told from the merged model stands here on the logarithmic scale


def draw(path: Path, types: Mapping[str, tuple[int, float]]) -> None:
    """Write a PNG of about 640 x 400 pixels, well under 100 kB. The same numbers give the same bytes.

    Args:
        types: GGUF type -> (bytes of its file, mean KL divergence from the merged model in nats per token).
    """
    figure, axes = blank()
    by_size = sorted(types.items(), key=lambda entry: (entry[1], entry[0]))
    sizes = [size / 1e6 for _, (size, _) in by_size]
    divergences = [max(kl, LEAST) for _, (_, kl) in by_size]
    axes.plot(sizes, divergences, color="#08519c", linewidth=0, marker="o", markersize=5)
    for number, ((kind, _), size, kl) in enumerate(zip(by_size, sizes, divergences, strict=True)):
        # Types of nearly the same size: their names go left and right in turn.
        aside, side = ((6, "left"), (-6, "right"))[number % 2]
        axes.annotate(kind, (size, kl), xytext=(aside, 0), textcoords="offset points", ha=side, va="center", fontsize=8)
    axes.margins(x=0.15, y=0.1)
    axes.set_yscale("log")
    axes.set_xlabel("size of the file (MB)")
    axes.set_ylabel("mean KL(merged || GGUF), nats per token")
    axes.grid(alpha=0.3)
    save(figure, path)
