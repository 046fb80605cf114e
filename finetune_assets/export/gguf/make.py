"""A merged model -> one GGUF file for each wanted type, making only those that are not there yet."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune_assets.export.gguf import imatrix_file
from finetune_assets.export.gguf.converter import convert, natural_type
from finetune_assets.export.gguf.quantise import link_or_copy, make_types
from finetune_assets.recipe.gguf_types import IMATRIX_TYPES
from finetune_assets.reporting.events import Progress, message
from finetune_assets.store.digests import digest_of_file


def make_gguf(
    merged: Path,
    types: list[str],
    out: Path,
    *,
    name: str,
    about: Mapping[str, Any],
    cache: Path,
    trust_remote_code: bool = False,
    kept: Mapping[str, tuple[Path, str]],
    measure: Callable[[Path, Path], None] | None,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Write `out`/`name`-TYPE.gguf for every type; type -> {"file": its name, "bytes": its size, "sha256": hex}.

    With an importance matrix, the types that go by it come with it: `out`/imatrix.gguf.

    Args:
        merged: Hugging Face folder with the chat template to embed.
        name, about: the model's name, and what else the files' metadata say; see `convert`.
        cache: where the converter is kept.
        trust_remote_code: let the converter run the code that comes with the model.
        kept: files made earlier of the same model by the same tools: type (imatrix.gguf by its name) -> path, and
            the sha256 (hex) it had then. What is something else by now is made again.
        measure: given a GGUF file of full precision, writes its importance matrix to a path; None: do without.

    Raises:
        StepFailed: the converter does not know the model, or failed.
    """
    made = {kind: out / f"{name}-{kind}.gguf" for kind in types}

    @functools.cache
    def whole(kind: str) -> Path | None:
        path, sha256 = kept.get(kind, (None, ""))
        return path if path is not None and digest_of_file(path) == sha256 else None

    digests: dict[str, str] = {}  # of what was written, before anything can happen to it
    for kind, file in made.items():
        if (path := whole(kind)) is not None:
            link_or_copy(path, file)
            digests[kind] = kept[kind][1]
    matrix = out / imatrix_file.FILE
    if any(kind in IMATRIX_TYPES for kind in types) and (path := whole(matrix.name)) is not None:
        link_or_copy(path, matrix)
    missing = [kind for kind in types if kind not in digests]
    if missing:
        full = natural_type(merged)
        source = whole(full)
        if source is None:
            source = out / f"{name}-{full}.gguf"
            progress(message(f"converting to GGUF ({full})"))
            convert(merged, source, full, cache, name=name, about=about, trust_remote_code=trust_remote_code)
        if measure is not None and not matrix.exists() and any(kind in IMATRIX_TYPES for kind in missing):
            measure(source, matrix)
        importance = imatrix_file.read_imatrix(matrix) if matrix.exists() else None
        for number, kind in enumerate(missing, 1):
            progress(message(f"making {kind} ({number} of {len(missing)})"))
            if made[kind] != source:
                make_types(source, [kind], out, name, importance)
            digests[kind] = digest_of_file(made[kind])
        if full not in types and whole(full) is None:
            source.unlink()
    return {
        kind: {"file": file.name, "bytes": file.stat().st_size, "sha256": digests[kind]} for kind, file in made.items()
    }
