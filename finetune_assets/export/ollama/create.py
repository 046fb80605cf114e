"""Models created on a running Ollama server, checked there under staging tags, and only then put in production."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune_assets.export.ollama import served_checks as ollama_checks
from finetune_assets.export.ollama.behaviour import Behaviour, behaviour
from finetune_assets.export.ollama.expected_answer import Expected
from finetune_assets.export.ollama.modelfile import OllamaModel
from finetune_assets.export.ollama.served_checks import Check
from finetune_assets.export.ollama.server import upload as ollama_upload
from finetune_assets.export.ollama.server.api import answers, digests, listed, show
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.reporting.events import Progress, message, silent

if TYPE_CHECKING:
    from ollama import Client


STAGING = "staging"  # begins the tags of models that are being made
PATIENCE = 600.0  # seconds for one request: a busy CPU server takes its time to load a model


@dataclass(frozen=True)
class Made:
    """A model in place.

    Attributes:
        digest: its manifest's.
        previous: that of what was served under the name before, if anything was.
        behaviour: how the server serves it.
    """

    digest: str
    previous: str | None
    behaviour: Behaviour


def create(
    host: str,
    models: Sequence[OllamaModel],
    expected: Mapping[str, Expected],
    *,
    retired: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> dict[str, Made]:
    """Make models of one base name on the server, and return them by name.

    Each is created and checked under a staging tag of its own; only when all are good do the production tags move.

    Args:
        expected: what llama.cpp answers with each model, by name.
        retired: models to take away when all is done, if they are still what is named here: name -> digest.
        progress: receives each stage, and the progress of sending the weights.

    Raises:
        StepFailed: the server fails, or serves something else than was asked for; what it served before stays.
    """
    from ollama import Client

    base = models[0].base
    client = Client(host=host, timeout=PATIENCE, trust_env=False)
    staging = {model.name: f"{base}:{STAGING}-{model.name.partition(':')[2]}" for model in models}
    moved: list[str] = []
    with _swept_at_the_end(client, host, listed(f"{base}:{STAGING}-")):
        with _explained(host, base, moved):
            before = digests(host)
            behaviours = {
                model.name: _stage(client, host, staging[model.name], model, expected[model.name], progress)
                for model in models
            }
            for name, staged in staging.items():
                client.copy(staged, name)
                moved.append(name)
            after = digests(host)
        for name, staged in staging.items():
            if listed(name) not in after or after[listed(name)] != after.get(listed(staged)):
                raise StepFailed(f"the Ollama server at {host} did not put {name} in place", "its log says more")
        _remove(client, [name for name, digest in (retired or {}).items() if after.get(listed(name)) == digest])
    return {name: Made(after[listed(name)], before.get(listed(name)), behaviours[name]) for name in staging}


def _stage(client: Client, host: str, name: str, model: OllamaModel, reply: Expected, progress: Progress) -> Behaviour:
    """Create a model under a staging name, and return how the server serves it.

    Raises:
        StepFailed: the server serves something else than was asked for.
    """
    ollama_upload.send(host, model.gguf, model.sha256, progress)
    progress(message(f"creating {model.name}"))
    _create(client, name, model)
    progress(message(f"checking what {model.name} serves"))
    version, shown = answers(host) or "of unknown version", show(host, name)
    checks = ollama_checks.written(shown, model, ollama_checks.weights(host, version, name, shown, model))
    _require(checks, host, model.name)
    served = behaviour(host, version, name, model, reply)
    _require(ollama_checks.answered(client, name, reply, served, keep_alive=0), host, model.name)
    return served


def _require(checks: Sequence[Check], host: str, name: str) -> None:
    """Raise StepFailed if a check failed."""
    if failed := [f"{check.name}: {check.found}" for check in checks if not check.ok]:
        raise StepFailed(
            f"the Ollama server at {host} does not serve {name} as it was made: {'; '.join(failed)}",
            "what it served before is unchanged; its log may say more",
        )


@contextlib.contextmanager
def _explained(host: str, base: str, moved: Sequence[str]) -> Iterator[None]:
    """Turn errors of the server and of the connection into StepFailed.

    Args:
        moved: names that serve the new models by then.
    """
    import httpx
    from ollama import RequestError, ResponseError

    try:
        yield
    except (ResponseError, RequestError) as error:
        raise StepFailed(
            f"the Ollama server at {host} refused {base}: {error}",
            f"{_state(moved)}; fix the server (see its log), then run again",
        ) from error
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise StepFailed(
            f"the Ollama server at {host} was lost while making {base}: {error or type(error).__name__}",
            f"{_state(moved)}; see that it is running and has room on its disk, and run again",
        ) from error


def _state(moved: Sequence[str]) -> str:
    """Return what the server serves after a failure."""
    if moved:
        return f"it serves the new {', '.join(moved)}, and no other of the new models"
    return "what it served before is unchanged"


def _create(client: Client, name: str, model: OllamaModel) -> None:
    for _ in client.create(
        model=name,
        files={model.gguf.name: f"sha256:{model.sha256}"},
        template=model.template,
        system=model.system,
        parameters=dict(model.parameters),
        license=list(model.licenses) or None,
        stream=True,
    ):
        pass


def _remove(client: Client, names: Sequence[str]) -> None:
    """Delete models, as far as the server lets us."""
    import httpx
    from ollama import ResponseError

    for name in names:
        with contextlib.suppress(ResponseError, httpx.HTTPError, OSError):
            client.delete(name)


@contextlib.contextmanager
def _swept_at_the_end(client: Client, host: str, prefix: str) -> Iterator[None]:
    """Delete all staging tags at the end, whatever happens, including those of a run that was killed."""
    import httpx
    from ollama import ResponseError

    try:
        yield
    finally:
        # The server is gone: the failure that led here says more, and the next run sweeps.
        with contextlib.suppress(ResponseError, httpx.HTTPError, OSError):
            for name in digests(host):
                if name.startswith(prefix):
                    client.delete(name)
