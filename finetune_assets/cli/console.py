"""The consoles of the command line: all output to the terminal goes through them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from finetune_assets.reporting.masking import mask
from finetune_assets.reporting.printable import printable


class SafeConsole(Console):
    """A console that prints text literally: no markup, no control characters that act on the terminal, no secrets.

    Args:
        file: where to write. Default: standard output, or standard error if `stderr` is set.
    """

    def __init__(self, *, file: IO[str] | None = None, stderr: bool = False):
        super().__init__(file=file, stderr=stderr, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments to print, with their text cleaned; rich's own control segments pass unchanged."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(mask(text)), style, control)
