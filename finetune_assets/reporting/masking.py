"""Masking of secrets in messages, logs, manifests and Dagster's database.

Texts are masked where they leave the program: when an error is raised, an event is published, a manifest is written,
or a logging record is made.
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
SHORTEST = 6  # characters: shorter values are settings, or occur in any text
# Environment variables that hold a secret have one of these words in their names.
SECRET_WORDS = {
    *("APIKEY", "CREDENTIAL", "CREDENTIALS", "KEY", "KEYS", "PASS", "PASSPHRASE", "PASSWD", "PASSWORD", "PAT"),
    *("SECRET", "SECRETS", "TOKEN", "TOKENS", "WEBHOOK"),
}
PLAIN_ENDS = {
    "DIR",
    "FILE",
    "ID",
    "NAME",
    "PATH",
}  # last words of names whose value is the place or the owner of a secret
ADDRESS_WORDS = {"ENDPOINT", "HOST", "INDEX", "MIRROR", "PROXY", "REGISTRY", "URI", "URL", "URLS"}

# Every repetition is bounded, so that the time is proportional to the length of the text.
_USER_INFO = re.compile(r"""(\b[A-Za-z][A-Za-z0-9+.-]{0,30}://)[^\s/?#'"<>]{0,1000}@""")
_PARAMETER = re.compile(
    r"""([?&;][\w.-]{0,60}(?:token|key|secret|passw|pwd|signature|sig|auth|credential)[\w.-]{0,60}=)[^&;\s#'"<>)\]]+""",
    re.I,
)
_HEADER = re.compile(r"(authorization\W{1,4}(?:basic|bearer|token)\s+)[\w.~+/=-]+", re.I)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def mask(text: str) -> str:
    """Mask user names and passwords in URLs, token parameters, hub tokens and values of secret variables."""
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    text = _USER_INFO.sub(rf"\1{HIDDEN}@", text)
    text = _PARAMETER.sub(rf"\1{HIDDEN}", text)
    text = _HEADER.sub(rf"\1{HIDDEN}", text)
    return _HUB_TOKEN.sub(f"hf_{HIDDEN}", text)


def masked(value: Any, but: Collection[str] = ()) -> Any:
    """Mask the texts of a JSON value, but not its keys.

    Args:
        but: keys of the outermost object whose values stay as they are.
    """
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, dict):
        return {key: item if key in but else masked(item) for key, item in value.items()}
    return [masked(item) for item in value] if isinstance(value, (list, tuple)) else value


class MaskedError(Exception):
    """A masked copy of an exception: its class and its masked text."""


def masked_error(error: BaseException) -> BaseException:
    """Return the error, or a masked copy of its chain if the error or one of its causes contains a secret."""
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
    """Mask every logging record of this process, whichever library makes it."""
    make = logging.getLogRecordFactory()
    if getattr(make, "masks", False):
        return

    def factory(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make(*arguments, **named)
        with suppress(TypeError, ValueError):  # the arguments of the record do not fit; logging reports that
            text = record.getMessage()
            if (shown := mask(text)) != text:
                record.msg, record.args = shown, ()
        return record

    _mark(factory)
    logging.setLogRecordFactory(factory)


def _mark(factory: Callable[..., logging.LogRecord]) -> None:
    factory.__dict__["masks"] = True


def _secrets() -> list[str]:
    """Return the secrets in the environment, longest first."""
    secrets: set[str] = set()
    for name, value in os.environ.items():
        words = name.upper().split("_")
        if len(value) >= SHORTEST and SECRET_WORDS & set(words) and words[-1] not in PLAIN_ENDS:
            secrets.add(value)
        if "@" in value and ADDRESS_WORDS & set(words):
            secrets |= _passwords(value)
    return sorted(secrets, key=len, reverse=True)


def _passwords(addresses: str) -> set[str]:
    """Return the passwords in URLs, as written and percent-decoded."""
    secrets: set[str] = set()
    for address in addresses.split():
        with suppress(ValueError):
            parts = urlsplit(address if "://" in address else f"//{address}")
            user, _, password = parts.netloc.rpartition("@")[0].partition(":")
            secret = password or user  # a token may stand alone
            secrets |= {text for text in (secret, unquote(secret)) if len(text) >= SHORTEST}
    return secrets
