"""Short requests to an Ollama server: whether it answers, and what it serves. Standard library only."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import os
import re
import ssl
import urllib.error
import urllib.request
from typing import Any

from finetune_assets.reporting.errors import StepFailed

ADDRESS = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]+(/[^\s?#]*)?")
BUSY = 10.0  # seconds for a simple answer of a server that accepts connections


def configured_host() -> str:
    """Return the server that OLLAMA_HOST names, as http://host:port; Ollama's default if it is not set."""
    return parse_host(os.environ.get("OLLAMA_HOST", ""))


def parse_host(text: str) -> str:
    """Return the URL of an OLLAMA_HOST value ("host", ":port", "0.0.0.0:11434", "https://..."), parsed as in Ollama."""
    scheme, separator, rest = text.strip().strip("\"'").partition("://")
    if not separator:
        scheme, rest = "http", scheme
    # Ollama does not use passwords or keys in addresses; if there is one, it must not be shown.
    rest = re.sub("[?#].*", "?***", re.sub(".*@", "***@", rest))
    port = {"http": "80", "https": "443"}.get(scheme, "11434") if separator else "11434"
    place, _, path = rest.partition("/")
    if with_port := re.fullmatch(r"(\[[^]]*\]|[^:]*):(\w*)", place):
        host = with_port[1].strip("[]") or "127.0.0.1"
        port = with_port[2] if with_port[2].isdigit() and int(with_port[2]) < 65536 else port
    else:
        host = place.strip("[]") or "127.0.0.1"
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:  # a server may listen on all addresses; a client needs one
            host = "127.0.0.1" if address.version == 4 else "::1"
        host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}:{port}{'/' + path.strip('/') if path.strip('/') else ''}"


def answers(host: str, seconds: float = 1.0) -> str | None:
    """Return the version of the Ollama server at `host`, or None if nothing answers there.

    Args:
        seconds: to wait for a connection. A server that connects but is busy gets `BUSY` more to answer.

    Raises:
        StepFailed: the host is not an Ollama server, or it accepts connections and does not answer.
    """
    if not ADDRESS.fullmatch(host):
        raise StepFailed(
            f"{host} is not an Ollama server: not an address",
            "write OLLAMA_HOST like 127.0.0.1:11434, without user name, password or key, or unset it",
        )
    try:
        try:
            return str(_get(host, "/api/version", seconds)["version"])
        except TimeoutError:  # the connection exists: a failed one raises URLError
            return str(_get(host, "/api/version", BUSY)["version"])
    except TimeoutError as error:
        raise StepFailed(
            f"{host} accepts connections, but did not answer within {seconds + BUSY:.0f} seconds",
            "wait until it is less busy, or set OLLAMA_HOST to a different server",
        ) from error
    except urllib.error.HTTPError as error:
        reason = f"/api/version returned HTTP {error.code}"
    except urllib.error.URLError as error:  # refused, unknown host, no route
        if not isinstance(error.reason, ssl.SSLError):
            return None
        reason = f"no secure connection ({error.reason.reason})"
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        reason = f"its answer to /api/version cannot be read ({type(error).__name__})"
    raise StepFailed(
        f"{host} is not an Ollama server: {reason}", "set OLLAMA_HOST to the server's address, or unset it"
    )


def digest(host: str, name: str) -> str | None:
    """Return the manifest digest of a model on the server, or None if it does not have the model."""
    return digests(host).get(listed(name))


def digests(host: str) -> dict[str, str]:
    """Return the manifest digests of all models on the server, by name and tag as `listed` writes them.

    Raises:
        OSError: the server does not answer, or its answer cannot be read.
    """
    return {listed(model["name"]): model["digest"] for model in ask(host, "/api/tags", 10.0).get("models") or []}


def listed(name: str) -> str:
    """Return the common form of all names that a server treats as the same model.

    A server ignores case: if it has a model with the tag Q8_0, it also lists a later q8_0 as Q8_0.
    """
    plain = name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")
    return plain if ":" in plain else f"{plain}:latest"


def show(host: str, name: str, *, verbose: bool = False) -> dict[str, Any]:
    """Return the server's description of a model: template, system, parameters, modelfile and more. OSError as above.

    Args:
        verbose: include all GGUF metadata, even the tokenizer's vocabulary.
    """
    return ask(host, "/api/show", 60.0, {"model": name, **({"verbose": True} if verbose else {})})


def ask(host: str, path: str, seconds: float, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a server's answer. Raises OSError if there is none, or if it cannot be read."""
    try:
        return _get(host, path, seconds, body)
    except (http.client.HTTPException, ValueError) as error:
        raise ConnectionError(f"its answer to {path} cannot be read ({type(error).__name__})") from error


def _get(host: str, path: str, seconds: float, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(host + path, data=data, headers={"Content-Type": "application/json"})
    with _OPENER.open(request, timeout=seconds) as answer:
        return json.load(answer)


# Proxies of the environment are ignored: Ollama servers are local or in the same network.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
