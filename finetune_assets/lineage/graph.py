"""The graph: which assets there are, what each one reads, and what therefore makes it out of date.

An asset's fingerprint covers exactly what is named here. A new version of a step's code that changes what it makes
gets a new `code_version`; a new version of a library counts where it decides what is made, and not where it merely
rounds otherwise (docs/identity.md has the table; every manifest records the full versions).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata

from finetune_assets.export.gguf.converter import converter_version
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


def _exactly(*packages: str) -> dict[str, str]:
    return {name: metadata.version(name) for name in packages}


def _minor(*packages: str) -> dict[str, str]:
    """Major and minor version: patch releases, and builds for other devices, do not count."""
    return {name: ".".join(version.split(".")[:2]) for name, version in _exactly(*packages).items()}


NODES: dict[str, Node] = {
    node.name: node
    for node in (
        # this and the next one need Python alone (json, hashes), which gives the same in every version
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
        # files as they came, or quantised weights spelt out, which transformers has but one way to do
        Node(
            "base_model",
            reads=("model.model_name_or_path", "model.model_revision", "model.model_sha256", "model.trust_remote_code"),
            code_version="3",
        ),
        Node(
            "lora_adapter",
            reads=("train", "model.template", "model.default_system", "model.trust_remote_code"),
            upstreams=(Upstream("dataset_info", lambda _: ("train", "validation")), Upstream("base_model")),
            # torch: random numbers and the optimiser; transformers: batches, schedule and the model's code; trl: the
            # loss, and every setting that we leave alone; peft: what an adapter starts as and how it is scaled
            tools=lambda: _minor("torch", "transformers", "peft", "trl"),
            code_version="2",
        ),
        Node(
            "eval_metrics",
            reads=("evaluate", "train.cutoff_len", "model.trust_remote_code"),
            upstreams=(
                Upstream("dataset_info", lambda _: ("train", "test")),
                Upstream("base_model"),
                Upstream("lora_adapter"),
            ),
            # the segmenter and the smoothing decide the scores; the same weights answer alike in any torch, and an
            # adapter trained by another one is another upstream
            tools=lambda: _exactly("jieba", "nltk"),
        ),
        # additions and products of our own in float32: torch rounds them
        Node(
            "merged_model",
            reads=("export",),
            # the test rows are what it is compared with base and adapter by
            upstreams=(
                Upstream("dataset_info", lambda _: ("test",)),
                Upstream("base_model"),
                Upstream("lora_adapter"),
            ),
            code_version="3",
        ),
        Node(
            "gguf_file",
            # the names of base model and data sets are among the files' metadata
            reads=("gguf", "model.model_name_or_path", "model.model_revision", "dataset.dataset"),
            # the test rows are what files and merged model are compared by; others say which weights matter, if asked
            upstreams=(
                Upstream("dataset_info", lambda recipe: ("test", *filter(None, [recipe.gguf.imatrix]))),
                Upstream("merged_model"),
            ),
            # the converter lays out tensors and metadata, llama.cpp (xllamacpp) rounds and computes
            tools=lambda: {"converter": converter_version(), **_exactly("xllamacpp")},
            code_version="6",
        ),
        # what the server makes of it has a digest, which the plan asks for
        Node(
            "ollama_model",
            reads=("ollama", "model.default_system"),
            upstreams=(Upstream("gguf_file", lambda recipe: tuple(dict.fromkeys(recipe.served.values()))),),
            code_version="4",
        ),
    )
}
"""Every asset, upstreams before downstreams."""


def upstream_of(names: set[str]) -> set[str]:
    """The named assets and everything that they read, directly or not."""
    found = set(names)
    for node in reversed(NODES.values()):
        if node.name in found:
            found |= {up.asset for up in node.upstreams}
    return found
