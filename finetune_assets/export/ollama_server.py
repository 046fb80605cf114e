"""A model created on a running Ollama server, checked there under a staging tag, and only then put in production.

Quick questions (is a server there, what does it serve) use the standard library only; making a model uses the official
client.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.digests import digest_of_file
from finetune_assets.errors import StepFailed
from finetune_assets.export.ollama_store import Published

if TYPE_CHECKING:
    from ollama import Client

STAGING = "staging"
QUESTION = [{"role": "user", "content": "Who are you?"}]
PATIENCE = 600.0  # seconds for one request: a busy CPU server takes its time to load a model


def configured_host() -> str:
    """The server that OLLAMA_HOST names, as http://host:port; the usual one if it is not set."""
    return parse_host(os.environ.get("OLLAMA_HOST", ""))


def parse_host(text: str) -> str:
    """An OLLAMA_HOST value, read as Ollama reads it ("host", ":port", "0.0.0.0:11434", "https://..."), as a URL."""
    scheme, found, rest = text.strip().strip("\"'").partition("://")
    if not found:
        scheme, rest = "http", scheme
    port = {"http": "80", "https": "443"}.get(scheme, "11434") if found else "11434"
    place, _, path = rest.partition("/")
    if with_port := re.fullmatch(r"(\[[^]]*\]|[^:]*):(\w*)", place):
        host = with_port[1].strip("[]") or "127.0.0.1"
        port = with_port[2] if with_port[2].isdigit() and int(with_port[2]) < 65536 else port
    else:
        host = place.strip("[]") or "127.0.0.1"
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:  # a server listens everywhere; a client has to go somewhere
            host = "127.0.0.1" if address.version == 4 else "::1"
        host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}:{port}{'/' + path.strip('/') if path.strip('/') else ''}"


def answers(host: str, seconds: float = 1.0) -> str | None:
    """The version of the Ollama server at `host`, or None if nothing answers there.

    Raises:
        StepFailed: something answers that is no Ollama server.
    """
    try:
        return str(_get(host, "/api/version", seconds)["version"])
    except urllib.error.HTTPError as error:
        reason = f"it answers {error.code} to /api/version"
    except OSError:  # refused, timed out, no such host
        return None
    except (ValueError, KeyError, TypeError) as error:
        reason = f"its answer to /api/version cannot be read ({type(error).__name__})"
    raise StepFailed(f"{host} is no Ollama server: {reason}", "set OLLAMA_HOST to the server's address, or unset it")


def digest(host: str, name: str) -> str | None:
    """The manifest digest of a model on the server, or None where it has none of that name."""
    return digests(host).get(name if ":" in name else f"{name}:latest")


def digests(host: str) -> dict[str, str]:
    """The manifest digests of all models on the server, by name and tag."""
    return {model["name"]: model["digest"] for model in _get(host, "/api/tags", 10.0).get("models") or []}


def create(
    host: str,
    name: str,
    gguf: Path,
    *,
    template: str,
    system: str | None,
    parameters: Mapping[str, Any],
    licenses: Sequence[str] = (),
    probe: Sequence[Mapping[str, str]] = QUESTION,
    probe_tokens: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Published:
    """Make `name`:latest of `gguf` on the server: create and check `name`:staging, then copy it over.

    Args:
        probe: a short conversation that the model has to answer.
        probe_tokens: tokens of the prompt that it becomes, the served system message included; None: not compared.
        progress: called with one line for each stage.

    Raises:
        StepFailed: the server fails, or serves something else than was asked for; `name`:latest stays what it was.
    """
    import httpx
    from ollama import Client, RequestError, ResponseError

    say = progress or (lambda line: None)
    client = Client(host=host, timeout=PATIENCE, trust_env=False)
    staging, production = f"{name}:{STAGING}", f"{name}:latest"
    weights = f"sha256:{digest_of_file(gguf)}"
    with _removed_at_the_end(client, staging):
        try:
            if not _has_blob(host, weights):
                say("sending the weights")
                client.create_blob(gguf)
            say("creating the model")
            made = client.create(
                model=staging,
                files={gguf.name: weights},
                template=template,
                system=system,
                parameters=dict(parameters),
                license=list(licenses) or None,
                stream=True,
            )
            for _ in made:
                pass
            say("checking what it serves")
            _check_written(host, staging, weights, template, system or "", parameters)
            _check_answer(client, staging, probe, probe_tokens)
            client.copy(staging, production)
        except (ResponseError, RequestError) as error:
            raise StepFailed(f"the Ollama server at {host} refused {name}: {error}", "its log says more") from error
        except (httpx.HTTPError, OSError, ConnectionError) as error:
            raise StepFailed(
                f"the Ollama server at {host} was lost while making {name}: {error or type(error).__name__}",
                "is it still running, and has its disk space? What was served before is unchanged",
            ) from error
        served = digest(host, production)
        if served is None or served != digest(host, staging):
            raise StepFailed(f"the Ollama server at {host} did not put {production} in place", "its log says more")
    return Published(name, served, ())


def show(host: str, name: str) -> dict[str, Any]:
    """What the server tells about a model: template, system, parameters, modelfile and more."""
    return _get(host, "/api/show", 60.0, {"model": name})


def _check_written(
    host: str, name: str, weights: str, template: str, system: str, parameters: Mapping[str, Any]
) -> None:
    written = show(host, name)
    source = re.search(r"^FROM .*sha256[-:]([0-9a-f]{64})", written.get("modelfile", ""), re.MULTILINE)
    found: list[tuple[str, Any, Any]] = [
        ("weights", weights, f"sha256:{source[1]}" if source else None),
        ("TEMPLATE", template, written.get("template", "")),
        ("SYSTEM", system, written.get("system", "")),
    ]
    # Each line is a name, spaces, and the value; texts as Go quotes them.
    lines = written.get("parameters", "").splitlines()
    stops = sorted(line.split(None, 1)[1] for line in lines if line.startswith("stop "))
    wanted_stops = sorted(json.dumps(stop, ensure_ascii=False) for stop in parameters.get("stop", []))
    if wanted_stops:  # given none, a server may have ideas of its own
        found.append(("stop", wanted_stops, stops))
    for what, wanted, got in found:
        if wanted != got:
            raise StepFailed(f"the Ollama server wrote another {what} than it was given: {got!r} instead of {wanted!r}")


def _check_answer(client: Client, name: str, probe: Sequence[Mapping[str, str]], tokens: int | None) -> None:
    answer = client.chat(
        model=name,
        messages=[dict(message) for message in probe],
        options={"temperature": 0, "num_predict": 4},
        keep_alive=0,
    )
    if tokens is not None and answer.prompt_eval_count != tokens:
        raise StepFailed(
            f"the Ollama server reads {answer.prompt_eval_count} tokens where training would read {tokens}",
            "its TEMPLATE or its begin-of-text token is not the chat template's",
        )
    if not answer.eval_count:
        raise StepFailed(f"the model says nothing to {probe[-1]['content']!r} on the Ollama server")


@contextlib.contextmanager
def _removed_at_the_end(client: Client, name: str) -> Iterator[None]:
    from ollama import ResponseError

    try:
        yield
    finally:
        # Never made, or the server is gone: the failure that led here says more.
        with contextlib.suppress(ResponseError, OSError, ConnectionError):
            client.delete(name)


def _has_blob(host: str, digest_: str) -> bool:
    try:
        request = urllib.request.Request(f"{host}/api/blobs/{digest_}", method="HEAD")
        with _OPENER.open(request, timeout=60.0):
            return True
    except urllib.error.HTTPError:
        return False


def _get(host: str, path: str, seconds: float, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(host + path, data=data, headers={"Content-Type": "application/json"})
    with _OPENER.open(request, timeout=seconds) as answer:
        return json.load(answer)


# Servers are near: no proxy of the environment stands between.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
