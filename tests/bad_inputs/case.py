"""A bad input, and how a command answered it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 10.0
MEMORY = 1_500_000_000  # bytes resident; a command with Dagster in it takes 0.25e9
ADDRESS_SPACE = 16 << 30  # what runs away is stopped before the machine is
DEEP = 100_000
LONG = "7" * 5_000  # digits
Change = Callable[[Path], None]
PLAN = ("plan", "mini")
DATA = ("run", "mini", "--to", "dataset_info")
BASE = ("run", "mini", "--to", "base_model")


@dataclass(frozen=True)
class Case:
    """One bad input.

    Args:
        names: the message has to hold one of these.
        change: what is done to the project's folder first.
    """

    family: str
    title: str
    names: tuple[str, ...]
    change: Change = lambda root: None
    command: tuple[str, ...] = PLAN
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """How a command ended. `code` is None if it had to be killed; `memory` in bytes."""

    code: int | None
    text: str
    seconds: float
    memory: int

    def fault(self, case: Case) -> str | None:
        """What is wrong with this answer to a bad input; None if nothing is."""
        if self.code is None or self.seconds > SECONDS:
            return f"did not end within {SECONDS:.0f} s"
        if "Traceback" in self.text or re.search(r"unexpected \w*(Error|Exception)|failed unexpectedly", self.text):
            return "an error that nobody foresaw"
        if self.code not in (1, 2):
            return f"exit code {self.code}"
        if self.memory > MEMORY:
            return f"took {self.memory / 1e6:.0f} MB"
        if not any(name in self.text for name in case.names):
            return f"the message names none of {', '.join(case.names)}"
        return None
