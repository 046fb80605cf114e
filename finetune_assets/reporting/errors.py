"""The two ways a run can fail, each with one message a person can act on.

Everything that a user can put right is raised as one of these; the command line prints the message (and the
hint) without a traceback and exits with `exit_code`.
"""

from __future__ import annotations

import traceback
from pathlib import Path

from finetune_assets.reporting.masking import mask

PACKAGE = Path(__file__).resolve().parents[1]
LONGEST = 500  # characters shown of the text of an unforeseen error


class FinetuneError(Exception):
    """A failure explained: what was wrong and where (`message`), and what to do about it (`hint`)."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        self.message = mask(clean(message))
        self.hint = mask(clean(hint)) if hint else hint
        super().__init__(f"{self.message}\n{self.hint}" if self.hint else self.message)


class StepFailed(FinetuneError):
    """A step or a check could not do its work: the base model is not there, the disk is full, a server is down."""

    exit_code = 1


class BadInput(FinetuneError):
    """The recipe, the data or the command line is wrong; nothing was started."""

    exit_code = 2


def clean(text: str) -> str:
    """A text as UTF-8 can carry it: bytes of a file's name that are not text become escapes such as `\\udcff`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def unforeseen(error: Exception, what: str) -> StepFailed:
    """Describe an error that nobody foresaw: its type, its text, and the line of this program that met it.

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
    """The innermost line of this program that the error passed: ` (export/merge.py:120)`."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE):
            return f" ({file.relative_to(PACKAGE).as_posix()}:{line})"
    return ""
