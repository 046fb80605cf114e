"""A check that a file did not pass."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """A check that a file did not pass: its name, what it measured, and what is allowed."""

    check: str
    measured: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.check}: {self.measured}, allowed: {self.allowed}"
