"""ollama_model: the GGUF files as models that Ollama serves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune_assets.export.ollama import model_store
from finetune_assets.export.ollama.publish import (
    OWN_STORE,
    digests_of,
    served_digests,
    serving_problem,
    unused_blobs,
)
from finetune_assets.export.ollama.server import api as ollama_server
from finetune_assets.lineage.cost import Cost, Known, seconds_of
from finetune_assets.lineage.node import Node, Upstream, metrics_named
from finetune_assets.lineage.nodes.gguf_file import gguf_bytes
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import FinetuneError, StepFailed
from finetune_assets.store.artifact import Artifact

LINKED = 4096  # bytes of a model in the project's own Ollama store besides its weights, which are a link
HEADLINE = metrics_named("name", "digest", "where", "place")


def _problem(artifact: Artifact, project: Project) -> str | None:
    return serving_problem(artifact.metrics, project.ollama_models)


def _headline(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    values = HEADLINE(metrics)
    if "place" in values and metrics.get("where") == "store":
        values["place"] = OWN_STORE  # an earlier release recorded the folder
    return values


def _cost(node: Node, known: Known) -> Cost:
    """Count the weights only if they are copied to a server: the project's own store links them."""
    past = known.past(node.name)
    copied = past is not None and past.metrics.get("where") == "server"
    kinds = set(known.recipe.served.values()) if copied else set()
    sizes = [gguf_bytes(known, kind) for kind in kinds]
    size = None if None in sizes else sum(size or 0 for size in sizes) + LINKED
    return Cost(seconds_of(past, node.code_version), size)


def _check_server() -> None:
    try:
        ollama_server.answers(ollama_server.configured_host())
    except StepFailed as error:
        if not isinstance(error.__cause__, TimeoutError):  # it may answer by the time it is needed
            raise


class _Serving:
    """The digests that are served under each model name; each name is looked up once."""

    def __init__(self, models: Path):
        self._models = models
        self._digests: dict[str, set[str] | None] = {}

    def reason(self, artifact: Artifact) -> str | None:
        """Return why an ollama_model must stay, or None."""
        for name, digest in digests_of(artifact.metrics).items():
            served = self._served(name)
            if served is None:
                return "the Ollama server cannot be queried"
            if digest in served:
                return f"served as {name.removesuffix(':latest')}"
        return None

    def _served(self, name: str) -> set[str] | None:
        if name not in self._digests:
            try:
                self._digests[name] = served_digests(name, self._models)
            except (FinetuneError, OSError):
                self._digests[name] = None
        return self._digests[name]


@contextmanager
def unused_files(models: Path) -> Iterator[list[Path]]:
    """Hold the lock of the project's own Ollama store, and yield its files that belong to no model.

    Raises:
        StepFailed: a model is being written, or a running server may be using the store.
        OSError: the server no longer answers.
    """
    from filelock import Timeout

    if not (models / "blobs").is_dir():
        yield []
        return
    try:
        lock = model_store.lock(models).acquire(timeout=0)
    except Timeout:
        raise StepFailed("a model is being written") from None
    with lock:
        yield unused_blobs(models)


# No tools: the plan compares the digest that is served with the one on record.
NODE = Node(
    "ollama_model",
    reads=("ollama", "model.default_system"),
    upstreams=(Upstream("gguf_file", lambda recipe: tuple(dict.fromkeys(recipe.served.values()))),),
    code_version="4",
    problem=_problem,
    headline=_headline,
    cost=_cost,
    check_ready=_check_server,
    in_use=lambda project: _Serving(project.ollama_models).reason,
)
