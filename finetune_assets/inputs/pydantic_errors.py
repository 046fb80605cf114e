"""Pydantic's errors as people read them: one line each, with the key, the cause and the value."""

from __future__ import annotations

from collections.abc import Callable

from pydantic_core import ErrorDetails

Location = tuple[int | str, ...]
LONGEST_VALUE = 80  # characters of a value that a message quotes


def explain(error: ErrorDetails, suggestion: Callable[[Location], str]) -> str:
    """Describe an error in what a person wrote.

    Args:
        suggestion: returns what to append for an unknown key, such as "; did you mean 'seed'?".
    """
    key = dotted(error["loc"])
    match error["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key{suggestion(error['loc'])}"
        case "missing":
            return f"{key}: missing"
        case "model_type" | "model_attributes_type":
            return f"{key}: must be a mapping of keys, not {_shown(error['input'])}"
        case "value_error":
            return f"{key}: {cause(error)}" if key else cause(error)
        case _:
            return f"{key}: {cause(error)}, not {_shown(error['input'])}"


def cause(error: ErrorDetails) -> str:
    """Return what is wrong, without the key and the value."""
    message = error["msg"].removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def dotted(location: Location) -> str:
    """Return the key: `gguf.types.0`."""
    return ".".join(str(part) for part in location if part != "[key]")  # pydantic marks a mapping's key so


def _shown(value: object) -> str:
    """Return a value as Python writes it, in at most one line."""
    text = repr(value)
    return text if len(text) < LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."
