"""The two kinds of failures, each with a message that a person can act on.

What a user can correct is raised as one of these. The command line prints the message and the hint without a
traceback, and exits with `exit_code`.
"""

from __future__ import annotations

import traceback
from pathlib import Path

from finetune_assets.reporting.masking import mask

PACKAGE = Path(__file__).resolve().parents[1]
LONGEST = 500  # characters of an unexpected error's text that are shown


class FinetuneError(Exception):
    """A failure: what is wrong and where (`message`), and what to do (`hint`)."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        self.message = mask(clean(message))
        self.hint = mask(clean(hint)) if hint else hint
        super().__init__(f"{self.message}\n{self.hint}" if self.hint else self.message)


class StepFailed(FinetuneError):
    """A step or a check that failed: a base model is missing, the disk is full, a server is down."""

    exit_code = 1


class BadInput(FinetuneError):
    """An error in the recipe, the data or the command line; nothing was started."""

    exit_code = 2


def clean(text: str) -> str:
    """Return a text that UTF-8 can encode: undecodable bytes of a file name become escapes such as `\\udcff`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def unforeseen(error: Exception, what: str) -> StepFailed:
    """Describe an unexpected error: its type, its text, and the line of this program where it passed.

    Args:
        what: the work that failed, such as `demo/lora_adapter`.
    """
    text = " ".join(str(error).split())
    shown = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    if isinstance(error, MemoryError):
        return StepFailed(f"{what} failed: not enough memory{_place(error)}", "free memory, or use a smaller model")
    return StepFailed(
        f"{what} failed unexpectedly: {type(error).__name__}{f': {shown}' if shown else ''}{_place(error)}",
        "run again with --debug for the traceback; Dagster's log of the step has it too",
    )


def _place(error: Exception) -> str:
    """Return the innermost line of this program in the traceback: ` (export/merge/merge.py:120)`."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE):
            return f" ({file.relative_to(PACKAGE).as_posix()}:{line})"
    return ""
