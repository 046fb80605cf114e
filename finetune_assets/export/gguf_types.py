"""A merged model -> one GGUF file for each wanted type, making only those that are not there yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune_assets.export.converter import convert, natural_type
from finetune_assets.export.quantise import link_or_copy, make_types


def make_gguf(
    merged: Path,
    types: list[str],
    out: Path,
    *,
    name: str,
    about: Mapping[str, Any],
    cache: Path,
    kept: Mapping[str, Path],
    progress: Callable[[dict[str, Any]], None],
) -> dict[str, dict[str, Any]]:
    """Write `out`/`name`-TYPE.gguf for every type; type -> {"file": its name, "bytes": its size}.

    Args:
        merged: Hugging Face folder with the chat template to embed.
        name, about: the model's name, and what else the files' metadata say; see `convert`.
        cache: where the converter is kept.
        kept: files made earlier of the same model by the same tools: type -> path.

    Raises:
        StepFailed: the converter does not know the model, or failed.
    """
    for kind in types:
        if kind in kept:
            link_or_copy(kept[kind], out / f"{name}-{kind}.gguf")
    missing = [kind for kind in types if kind not in kept]
    if missing:
        full = natural_type(merged)
        source = out / f"{name}-{full}.gguf"
        if full in kept:
            source = kept[full]
        else:
            progress({"event": "message", "text": f"converting to GGUF ({full})"})
            convert(merged, source, full, cache, name=name, about=about)
        for number, kind in enumerate(missing, 1):
            progress({"event": "message", "text": f"making {kind} ({number} of {len(missing)})"})
            if (out / f"{name}-{kind}.gguf") != source:
                make_types(source, [kind], out, name)
        if full not in types and full not in kept:
            source.unlink()
    return {
        kind: {"file": f"{name}-{kind}.gguf", "bytes": (out / f"{name}-{kind}.gguf").stat().st_size} for kind in types
    }


def bytes_decided_by(ingredients: Mapping[str, Any]) -> dict[str, Any]:
    """What of a gguf_file's fingerprint decides its files; the rest decides how they compare with the merged model.

    Args:
        ingredients: as of `artifacts.Fingerprint`.
    """
    decisive = {"upstreams": ("merged_model",), "tools": ("converter", "libgguf")}
    whole = {key: value for key, value in ingredients.items() if key not in ("recipe", *decisive)}
    told = {key: value for key, value in ingredients["recipe"].items() if not key.startswith("gguf.")}  # metadata
    return {**whole, "told": told} | {
        key: [ingredients[key].get(name) for name in names] for key, names in decisive.items()
    }
