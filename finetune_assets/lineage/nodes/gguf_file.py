"""gguf_file: the merged model in llama.cpp's format, one file for each type, and what decides each file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from finetune_assets.export.gguf import imatrix_file
from finetune_assets.export.gguf.converter import converter_version
from finetune_assets.lineage.cost import Cost, Known, seconds_of, times
from finetune_assets.lineage.identity import fingerprint
from finetune_assets.lineage.node import Node, Upstream, exact_versions, metrics_named
from finetune_assets.lineage.nodes.base_model import BaseFacts
from finetune_assets.models.formats.safetensors import FLOATS
from finetune_assets.recipe.gguf_types import TYPES, lossless_type
from finetune_assets.store.artifact import Artifact


def kept_files(made: Mapping[str, Any], wanted: Mapping[str, Any], kinds: Iterable[str]) -> set[str]:
    """Return the kinds of files (types, or imatrix.gguf) that would be made again byte for byte.

    Args:
        made, wanted: ingredients of two fingerprints of gguf_file.
    """
    return {kind for kind in kinds if _decides_bytes(made, kind) == _decides_bytes(wanted, kind)}


def kept_figures(made: Mapping[str, Any], wanted: Mapping[str, Any], kinds: Iterable[str]) -> set[str]:
    """Return the types whose comparison with the merged model would give the same figures; arguments as above."""
    same_rows = _test_rows(made) == _test_rows(wanted)
    return kept_files(made, wanted, kinds) if same_rows else set()


def _decides_bytes(ingredients: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the part of a fingerprint that decides one file; the rest only decides its comparison with the model."""
    recipe, upstreams, tools = (ingredients[key] for key in ("recipe", "upstreams", "tools"))
    decides: dict[str, Any] = {
        **{key: value for key, value in ingredients.items() if key not in ("recipe", "upstreams", "tools")},
        "metadata": {key: value for key, value in recipe.items() if not key.startswith("gguf.")},
        "merged_model": upstreams.get("merged_model"),
        "tools": [tools.get(name) for name in ("converter", "xllamacpp")],
    }
    if kind == imatrix_file.FILE or (kind in TYPES and TYPES[kind].uses_imatrix):
        rows = recipe.get("gguf.imatrix")
        decides["imatrix"] = [rows, upstreams.get(f"dataset_info/{rows}")]
    return decides


def _test_rows(ingredients: Mapping[str, Any]) -> str | None:
    return ingredients["upstreams"].get("dataset_info/test")


def _cost(node: Node, known: Known) -> Cost:
    """Count the bytes of the types that are not kept, and the time of those that are not yet proven."""
    types, past = known.recipe.gguf.types, known.past(node.name)
    base = known.of(BaseFacts)
    scale = base.scale(past)
    kept, proven = _kept_types(node, known, past)
    missing = [kind for kind in types if kind not in kept]
    unproven = len([kind for kind in types if kind not in proven])
    seconds = _seconds(node, known, past, scale, unproven) if past is not None and scale is not None else None
    sizes = [size for kind in missing if (size := gguf_bytes(known, kind)) is not None]
    natural = _natural_type(known)
    needs_source = bool(missing) and natural not in types and natural not in kept
    scratch = round(base.weights.total() * TYPES[natural].bits / 8) if needs_source else 0
    return Cost(seconds, sum(sizes) if len(sizes) == len(missing) else None, scratch)


def _seconds(node: Node, known: Known, past: Artifact, scale: float, unproven: int) -> float | None:
    """Estimate the time for some types: conversion and the merged model's answers take about as long as one type.

    Each past run made some of its types, and none recorded how many: the slowest made most.
    """
    runs = [run for run in known.store.published(past.manifest["recipe"], node.name) if run.metrics.get("types")]
    each = [
        seconds / (1 + len(run.metrics["types"]))
        for run in runs
        if (seconds := seconds_of(run, node.code_version)) is not None
    ]
    return times(max(each, default=None), (1 + unproven) * scale if unproven else 0)


def gguf_bytes(known: Known, kind: str) -> int | None:
    """Return the size of one GGUF file: what it was before, else by the number of weights."""
    base, past = known.of(BaseFacts), known.past("gguf_file")
    scale = base.scale(past)
    before = past.metrics["types"].get(kind) if past is not None else None
    if before is not None and scale is not None:
        return round(before["bytes"] * scale)
    return round(base.weights.total() * TYPES[kind].bits / 8) if base.weights else None


def _kept_types(node: Node, known: Known, past: Artifact | None) -> tuple[set[str], set[str]]:
    """Return the types whose files the next run keeps, and those whose comparison it keeps, too."""
    item = known.plan[node.name]
    upstreams = {up.asset: artifact for up in node.upstreams if (artifact := known.plan[up.asset].artifact)}
    own = past is not None and past.manifest["recipe"] == known.recipe.name and past.fingerprint != item.wanted
    if past is None or not own or len(upstreams) < len(node.upstreams):
        return set(), set()
    wanted = fingerprint(node, known.recipe, upstreams, {}).ingredients
    made, types = past.manifest["ingredients"], past.metrics["types"]
    return kept_files(made, wanted, types), kept_figures(made, wanted, types)


def _natural_type(known: Known) -> str:
    """Return the GGUF type that the merged model is converted to first."""
    dtype = known.recipe.export.export_dtype
    stored = set(known.of(BaseFacts).weights) if dtype == "auto" else {FLOATS[dtype]}
    return lossless_type(stored)


NODE = Node(
    "gguf_file",
    # the files' metadata name the base model and the data sets
    reads=("gguf", "model.model_name_or_path", "model.model_revision", "dataset.dataset"),
    # test: files and merged model are compared on these rows; the importance matrix is measured on its own rows
    upstreams=(
        Upstream("dataset_info", lambda recipe: ("test", *filter(None, [recipe.gguf.imatrix]))),
        Upstream("merged_model"),
    ),
    # the converter lays out tensors and metadata, llama.cpp (xllamacpp) quantises and computes
    tools=lambda: {"converter": converter_version(), **exact_versions("xllamacpp")},
    code_version="6",
    headline=metrics_named("types"),
    cost=_cost,
)
