"""Small pictures of figures: a blank one, its file, and its embedding in Markdown."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def blank() -> tuple[Figure, Axes]:
    """Return a figure of about 640 x 400 pixels with one pair of axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure and canvas by hand, not pyplot: no global state, no window system, safe in several threads.
    figure = Figure(figsize=(6.4, 4.0), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def save(figure: Figure, path: Path) -> None:
    """Write a PNG. The same figure gives the same bytes: the file does not name the program that wrote it."""
    figure.savefig(path, format="png", metadata={"Software": None})


def embedded(path: Path, title: str) -> str:
    """Return Markdown that contains the picture itself."""
    return f"![{title}](data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()})"
