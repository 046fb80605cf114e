"""base_model: the model that training starts from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_assets.lineage.cost import Cost, Download, Known, seconds_of
from finetune_assets.lineage.identity import value_then
from finetune_assets.lineage.node import Node, metrics_named
from finetune_assets.models import base_model
from finetune_assets.models.base_model import Local, local_files, locate
from finetune_assets.models.formats.safetensors import BYTES_OF, read_head
from finetune_assets.recipe import Recipe
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.store.artifact import Artifact
from finetune_assets.store.digests import DigestCache

if TYPE_CHECKING:
    from finetune_assets.models.hub import Announced


def _sources(recipe: Recipe, project: Project, digests: DigestCache) -> Mapping[str, str]:
    return base_model.source_digests(recipe.model, project.root, digests)


def _cost(node: Node, known: Known) -> Cost:
    base = known.of(BaseFacts)
    hub = base.announced
    download = Download(hub.missing, hub.cache) if hub is not None and hub.missing else None
    return Cost(seconds_of(base.artifact, node.code_version), base.bytes, download=download)


class BaseFacts:
    """Size and weights of the recipe's base model, as far as they are known before it is fetched."""

    def __init__(self, known: Known):
        self._known = known
        self._model, self._root = known.recipe.model, known.project.root

    @cached_property
    def announced(self) -> Announced | None:
        """The hub's answer about the model, if the hub may be asked."""
        return base_model.announced(self._model, self._root) if self._known.ask_hub else None

    @cached_property
    def artifact(self) -> Artifact | None:
        """The published base model, of any recipe, if there is one."""
        if (artifact := self._known.plan["base_model"].artifact) is not None:
            return artifact
        past = self._known.past("base_model")
        name = "model.model_name_or_path"
        if past is None or value_then(past, self._known.recipe, name) != self._model.model_name_or_path:
            return None
        return past

    @cached_property
    def _folder(self) -> Path | None:
        if self.artifact is not None:
            return self.artifact.path
        source = locate(self._model, self._root)
        return source.folder if isinstance(source, Local) else None

    @cached_property
    def bytes(self) -> int | None:
        """The size of all its files; None: unknown."""
        if self.artifact is not None:
            return self.artifact.size
        if self._folder is not None:
            return sum(path.stat().st_size for path in local_files(self._folder, self._model).values())
        return self.announced.bytes if self.announced is not None else None

    @cached_property
    def weights(self) -> Counter[str]:
        """Elements of the weights by dtype (safetensors' names); empty: unknown."""
        if self._folder is not None:
            return weights_of(self._folder)
        weights = self.announced.weights if self.announced is not None else Counter()
        return Counter({name: count for name, count in weights.items() if name in BYTES_OF})

    def scale(self, past: Artifact | None) -> float | None:
        """Return how much larger today's base model is than the one of a past run; None: unknown."""
        if past is None or self.bytes is None:
            return None
        base = self._base_of(past)
        if base is None:  # removed since
            return 1.0 if past.manifest["recipe"] == self._known.recipe.name else None
        return self.bytes / max(base.size, 1)

    def _base_of(self, past: Artifact) -> Artifact | None:
        recipe, step = past.manifest["recipe"], past
        for above in ("gguf_file", "merged_model", "base_model"):
            if above in step.inputs:
                step = self._known.store.get(recipe, above, step.inputs[above])
                if step is None:
                    return None
        return step if step is not past else None


def weights_of(folder: Path) -> Counter[str]:
    """Return the elements by dtype of the safetensors files in a folder; empty if they cannot be read."""
    weights: Counter[str] = Counter()
    try:
        for path in folder.glob("*.safetensors"):
            for tensor in read_head(path)[1].values():
                if tensor["dtype"] in BYTES_OF:
                    weights[tensor["dtype"]] += math.prod(tensor["shape"])
    except (OSError, StepFailed):
        return Counter()
    return weights


# No tools: files unchanged, or weights dequantised by transformers, which has only one way to do it.
NODE = Node(
    "base_model",
    reads=("model.model_name_or_path", "model.model_revision", "model.model_sha256", "model.trust_remote_code"),
    code_version="3",
    sources=_sources,
    headline=metrics_named("source", "revision", "architecture"),
    cost=_cost,
)
