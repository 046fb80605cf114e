"""The two ways a run can fail, each with one message a person can act on.

Everything that a user can put right is raised as one of these; the command line prints the message (and the
hint) without a traceback and exits with `exit_code`.
"""

from __future__ import annotations


class FinetuneError(Exception):
    """A failure explained: what was wrong and where (`message`), and what to do about it (`hint`)."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        self.message = message
        self.hint = hint
        super().__init__(f"{message}\n{hint}" if hint else message)


class StepFailed(FinetuneError):
    """A step or a check could not do its work: the base model is not there, the disk is full, a server is down."""

    exit_code = 1


class BadInput(FinetuneError):
    """The recipe, the data or the command line is wrong; nothing was started."""

    exit_code = 2
