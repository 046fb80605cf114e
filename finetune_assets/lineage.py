"""The graph: which assets there are, what each one reads, and what therefore makes it out of date.

An asset's fingerprint covers exactly what is named here. A new version of a step's code that changes what it makes
gets a new `code_version`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata

from finetune_assets.export.converter import converter_version
from finetune_assets.recipe import Recipe


@dataclass(frozen=True)
class Upstream:
    """An asset that another one reads: all of it, or only the parts named for a recipe."""

    asset: str
    parts: Callable[[Recipe], tuple[str, ...]] | None = None


@dataclass(frozen=True)
class Node:
    """One asset of a lineage.

    Args:
        reads: recipe keys (`section` or `section.key`) whose values belong to the fingerprint.
        tools: versions of what decides the bytes that the step writes, by name.
    """

    name: str
    reads: tuple[str, ...]
    upstreams: tuple[Upstream, ...] = ()
    tools: Callable[[], Mapping[str, str]] = dict
    code_version: str = "1"


NODES: dict[str, Node] = {
    node.name: node
    for node in (
        Node("raw_dataset", reads=("dataset.dataset", "dataset.dataset_dir")),
        Node(
            "dataset_info",
            # disable_shuffling: only then does the order of rows mean anything
            reads=(
                "dataset.max_samples",
                "dataset.val_size",
                "dataset.test_size",
                "dataset.seed",
                "train.disable_shuffling",
            ),
            upstreams=(Upstream("raw_dataset"),),
        ),
        Node(
            "base_model",
            reads=("model.model_name_or_path", "model.model_revision", "model.model_sha256", "model.trust_remote_code"),
        ),
        Node(
            "lora_adapter",
            reads=("train", "model.template", "model.default_system", "model.trust_remote_code"),
            upstreams=(Upstream("dataset_info", lambda _: ("train", "validation")), Upstream("base_model")),
        ),
        Node(
            "eval_metrics",
            reads=("evaluate", "train.cutoff_len", "model.trust_remote_code"),
            upstreams=(
                Upstream("dataset_info", lambda _: ("train", "test")),
                Upstream("base_model"),
                Upstream("lora_adapter"),
            ),
            # the segmenter and the smoothing decide the scores
            tools=lambda: {name: metadata.version(name) for name in ("jieba", "nltk")},
        ),
        Node("merged_model", reads=("export",), upstreams=(Upstream("base_model"), Upstream("lora_adapter"))),
        Node(
            "gguf_file",
            reads=("gguf",),
            # the test rows are what files and merged model are compared by
            upstreams=(Upstream("dataset_info", lambda _: ("test",)), Upstream("merged_model")),
            # the converter lays out tensors and metadata, libgguf rounds, llama.cpp (xllamacpp) computes
            tools=lambda: {
                "converter": converter_version(),
                **{name: metadata.version(name) for name in ("libgguf", "xllamacpp")},
            },
            code_version="2",
        ),
        Node(
            "ollama_model",
            reads=("ollama", "model.default_system"),
            upstreams=(Upstream("gguf_file", lambda recipe: (recipe.served_type,)),),
        ),
    )
}
"""Every asset, upstreams before downstreams."""


def downstream_of(names: set[str]) -> set[str]:
    """The named assets and everything that reads them, directly or not."""
    found = set(names)
    for node in NODES.values():
        if any(up.asset in found for up in node.upstreams):
            found.add(node.name)
    return found


def upstream_of(names: set[str]) -> set[str]:
    """The named assets and everything that they read, directly or not."""
    found = set(names)
    for node in reversed(NODES.values()):
        if node.name in found:
            found |= {up.asset for up in node.upstreams}
    return found
