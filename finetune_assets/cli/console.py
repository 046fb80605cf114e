"""The consoles of the command line: the one door to the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from finetune_assets.reporting.masking import mask
from finetune_assets.reporting.printable import printable


class SafeConsole(Console):
    """A console that shows text as it is: no markup in it, nothing in it steers the terminal, no secret is in it.

    Args:
        file: where to write; standard output, or standard error if `stderr`, if not given.
    """

    def __init__(self, *, file: IO[str] | None = None, stderr: bool = False):
        super().__init__(file=file, stderr=stderr, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of anything that is printed, cleaned; those that rich makes to steer the terminal stay."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(mask(text)), style, control)
