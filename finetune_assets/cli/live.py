"""The live display of a run: one line for each asset, and a progress bar below the running one."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune_assets.cli.console import SafeConsole
from finetune_assets.cli.tables import duration
from finetune_assets.reporting.events import Begin, Done, Event, Message, StepProgress, Validation

GLYPHS = {"waiting": "·", "fresh": "=", "running": "▸", "done": "✓", "reused": "=", "failed": "✗"}
STYLES = {
    "waiting": "dim",
    "fresh": "dim",
    "running": "bold cyan",
    "done": "green",
    "reused": "dim",
    "failed": "bold red",
}
PLAIN_EVERY = 10.0  # seconds between two progress lines when the output is not a terminal


class LiveRun:
    """A context manager that shows the events of a run on standard error, as plain lines if that is not a terminal.

    While it is open, nothing else prints to the terminal: the output of libraries is in Dagster's log of the step.
    """

    def __init__(self, assets: Iterable[str], at_work: Iterable[str]):
        self._saved = (os.dup(1), os.dup(2))
        self._console = SafeConsole(file=os.fdopen(os.dup(2), "w", encoding="utf-8"))
        self._at_work = set(at_work)
        self._states = {name: "waiting" if name in self._at_work else "fresh" for name in assets}
        self._began: dict[str, float] = {}
        self._took: dict[str, float] = {}
        self._notes: dict[str, str] = {}
        self._step: dict[str, StepProgress] = {}
        self._last_plain = 0.0
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4, transient=False)

    def __enter__(self) -> LiveRun:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for original in (1, 2):
            os.dup2(nowhere, original)
        os.close(nowhere)
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            for name, state in self._states.items():
                if state == "running":
                    self._finish(name, "failed")
        if self._console.is_terminal:
            self._live.stop()
        self._console.file.close()
        sys.stdout.flush()
        sys.stderr.flush()
        for original, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(saved, original)
            os.close(saved)

    @property
    def reused(self) -> list[str]:
        """Return the assets that were to be built, but turned out to be up to date."""
        return [name for name, state in self._states.items() if state == "reused"]

    def event(self, asset: str, event: Event) -> None:
        """Show one published event."""
        match event:
            case Begin():
                self._states[asset] = "running"
                self._began[asset] = time.monotonic()
                self._plain(f"{asset}: begins")
            case StepProgress():
                self._step[asset] = event
                if time.monotonic() - self._last_plain >= PLAIN_EVERY:
                    self._plain(f"{asset}: {event.step}/{event.steps} {_figures(event)}")
            case Message():
                self._notes[asset] = event.text
                self._plain(f"{asset}: {event.text}")
            case Validation():
                self._notes[asset] = f"validation loss {event.loss:.3f}"
                self._plain(f"{asset}: {self._notes[asset]}")
            case Done():
                self._finish(asset, "reused" if event.reused else "done")
            case _:
                pass

    def _finish(self, asset: str, state: str) -> None:
        self._states[asset] = state
        self._took[asset] = time.monotonic() - self._began.get(asset, time.monotonic())
        self._notes.pop(asset, None)
        self._plain(f"{asset}: {state} ({duration(self._took[asset])})")

    def _plain(self, line: str) -> None:
        if not self._console.is_terminal:
            self._last_plain = time.monotonic()
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        below: list[RenderableType] = []
        for name, state in self._states.items():
            seconds = self._took.get(name)
            if state == "running":
                seconds = time.monotonic() - self._began[name]
            word = {"fresh": "up to date", "reused": "up to date"}.get(state, state)
            grid.add_row(
                Text(f"{GLYPHS[state]} {name}", style=STYLES[state]),
                Text(word, style=STYLES[state]),
                Text(duration(seconds) if seconds is not None else "", style="dim"),
                Text(self._notes.get(name, ""), style="dim"),
            )
            if state == "running" and name in self._step:
                event = self._step[name]
                below.append(ProgressBar(total=event.steps, completed=event.step, width=50))
                below.append(Text(f"{event.step}/{event.steps}  {_figures(event)}"))
        return Group(grid, *below)


def _figures(event: StepProgress) -> str:
    words = []
    if event.loss is not None:
        words.append(f"loss {event.loss:.3f}")
    if event.tokens_per_second is not None:
        words.append(f"{event.tokens_per_second:.0f} tokens/s")
    if event.seconds_left is not None:
        words.append(f"{duration(event.seconds_left)} left")
    return "  ".join(words)
