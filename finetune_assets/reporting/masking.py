"""Secrets kept out of what is shown and recorded: messages, logs, manifests and Dagster's database.

A text is masked where it leaves: errors as they are raised, events as they are passed on, manifests as they are
written, logging as its records are made.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any
from urllib.parse import unquote, urlsplit

from finetune_assets.reporting.causes import causes

HIDDEN = "***"
SHORTEST = 6  # characters: shorter values of a variable are settings, or would be found in any text
# Environment variables that hold a secret have one of these words in their names.
SECRET_WORDS = {
    *("APIKEY", "CREDENTIAL", "CREDENTIALS", "KEY", "KEYS", "PASS", "PASSPHRASE", "PASSWD", "PASSWORD", "PAT"),
    *("SECRET", "SECRETS", "TOKEN", "TOKENS", "WEBHOOK"),
}
PLAIN_ENDS = {"DIR", "FILE", "ID", "NAME", "PATH"}  # of names whose value says where a secret is, or whose it is
ADDRESS_WORDS = {"ENDPOINT", "HOST", "INDEX", "MIRROR", "PROXY", "REGISTRY", "URI", "URL", "URLS"}

# Bounded everywhere: a text of a million letters must not take longer than its length.
_USER_INFO = re.compile(r"""(\b[A-Za-z][A-Za-z0-9+.-]{0,30}://)[^\s/?#'"<>]{0,1000}@""")
_PARAMETER = re.compile(
    r"""([?&;][\w.-]{0,60}(?:token|key|secret|passw|pwd|signature|sig|auth|credential)[\w.-]{0,60}=)[^&;\s#'"<>)\]]+""",
    re.I,
)
_HEADER = re.compile(r"(authorization\W{1,4}(?:basic|bearer|token)\s+)[\w.~+/=-]+", re.I)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def mask(text: str) -> str:
    """The text without user names and passwords in addresses, token parameters, hub tokens, and values of secrets."""
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    text = _USER_INFO.sub(rf"\1{HIDDEN}@", text)
    text = _PARAMETER.sub(rf"\1{HIDDEN}", text)
    text = _HEADER.sub(rf"\1{HIDDEN}", text)
    return _HUB_TOKEN.sub(f"hf_{HIDDEN}", text)


def masked(value: Any, but: Collection[str] = ()) -> Any:
    """A JSON value with its texts masked, keys aside.

    Args:
        but: keys of the outermost object whose values stay as they are.
    """
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, dict):
        return {key: item if key in but else masked(item) for key, item in value.items()}
    return [masked(item) for item in value] if isinstance(value, (list, tuple)) else value


class MaskedError(Exception):
    """An exception as it may be recorded: class and text of another one."""


def masked_error(error: BaseException) -> BaseException:
    """The error itself, or, if it or one of its causes names a secret, a copy of the chain that does not."""
    chain = list(causes(error))
    if all(mask(str(link)) == str(link) for link in chain):
        return error
    copy: BaseException | None = None
    for link in reversed(chain):
        below, copy = copy, MaskedError(f"{type(link).__name__}: {mask(str(link))}")
        copy = copy.with_traceback(link.__traceback__)
        copy.__cause__ = below
    return copy or error


def mask_logging() -> None:
    """Have every logging record of this process masked when it is made, whichever library makes it."""
    make = logging.getLogRecordFactory()
    if getattr(make, "masks", False):
        return

    def factory(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make(*arguments, **named)
        with suppress(TypeError, ValueError):  # of a record whose arguments do not fit: logging reports it
            text = record.getMessage()
            if (shown := mask(text)) != text:
                record.msg, record.args = shown, ()
        return record

    _mark(factory)
    logging.setLogRecordFactory(factory)


def _mark(factory: Callable[..., logging.LogRecord]) -> None:
    factory.__dict__["masks"] = True


def _secrets() -> list[str]:
    """What the environment holds that nobody may read, longest first."""
    found: set[str] = set()
    for name, value in os.environ.items():
        words = name.upper().split("_")
        if len(value) >= SHORTEST and SECRET_WORDS & set(words) and words[-1] not in PLAIN_ENDS:
            found.add(value)
        if "@" in value and ADDRESS_WORDS & set(words):
            found |= _passwords(value)
    return sorted(found, key=len, reverse=True)


def _passwords(addresses: str) -> set[str]:
    """Passwords in addresses, as they are written there and as they are meant."""
    found: set[str] = set()
    for address in addresses.split():
        with suppress(ValueError):
            parts = urlsplit(address if "://" in address else f"//{address}")
            user, _, password = parts.netloc.rpartition("@")[0].partition(":")
            secret = password or user  # a token may stand alone
            found |= {text for text in (secret, unquote(secret)) if len(text) >= SHORTEST}
    return found
