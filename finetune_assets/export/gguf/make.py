"""Conversion of a merged model to one GGUF file for each type; files that exist already are kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_assets.export.gguf import imatrix_file
from finetune_assets.export.gguf.converter import convert, natural_type
from finetune_assets.export.gguf.quantise import Imatrix, link_or_copy, make_types
from finetune_assets.recipe.gguf_types import IMATRIX_TYPES
from finetune_assets.reporting.events import Progress, message
from finetune_assets.store.digests import digest_of_file


@dataclass(frozen=True)
class GgufInputs:
    """The inputs of a merged model's GGUF files, and where the files are written.

    Attributes:
        merged: Hugging Face folder with the chat template to embed.
        types: names of `gguf_types.TYPES`.
        out: folder of the files.
        name, about: the model's name and further metadata of the files; see `convert`.
        cache: folder of the converter.
        trust_remote_code: let the converter run the code that comes with the model.
        kept: files that the same tools made earlier of the same model: type (imatrix.gguf by its name) -> path, and the
            sha256 (hex) it had then. A file whose content has changed since is made again.
        measure: writes the importance matrix of a GGUF file of full precision to a path; None: use no matrix.
    """

    merged: Path
    types: Sequence[str]
    out: Path
    name: str
    about: Mapping[str, Any]
    cache: Path
    trust_remote_code: bool = False
    kept: Mapping[str, tuple[Path, str]] = field(default_factory=dict)
    measure: Callable[[Path, Path], None] | None = None

    @property
    def matrix(self) -> Path:
        """The file of the importance matrix."""
        return self.out / imatrix_file.FILE

    def file(self, kind: str) -> Path:
        """Return the file of a type."""
        return self.out / f"{self.name}-{kind}.gguf"

    def unchanged(self, kind: str) -> Path | None:
        """Return the kept file of a type if its content has not changed."""
        path, sha256 = self.kept.get(kind, (None, ""))
        return path if path is not None and digest_of_file(path) == sha256 else None


def make_gguf(inputs: GgufInputs, progress: Progress) -> dict[str, dict[str, Any]]:
    """Write the files; return type -> {"file": its name, "bytes": its size, "sha256": hex}.

    Raises:
        StepFailed: the converter does not know the model, or failed.
    """
    unchanged = functools.cache(inputs.unchanged)
    digests: dict[str, str] = {}  # of the files as written, before anything else can change them
    for kind in inputs.types:
        if (path := unchanged(kind)) is not None:
            link_or_copy(path, inputs.file(kind))
            digests[kind] = inputs.kept[kind][1]
    if _use_imatrix(inputs.types) and (path := unchanged(imatrix_file.FILE)) is not None:
        link_or_copy(path, inputs.matrix)
    if missing := [kind for kind in inputs.types if kind not in digests]:
        digests |= _make(inputs, missing, unchanged, progress)
    files = {kind: inputs.file(kind) for kind in inputs.types}
    return {
        kind: {"file": file.name, "bytes": file.stat().st_size, "sha256": digests[kind]} for kind, file in files.items()
    }


def _make(
    inputs: GgufInputs,
    types: Sequence[str],
    unchanged: Callable[[str], Path | None],
    progress: Progress,
) -> dict[str, str]:
    """Make files from one of full precision, which is converted unless it was kept; return type -> sha256 (hex)."""
    full = natural_type(inputs.merged)
    source = unchanged(full)
    is_temporary = source is None and full not in inputs.types
    if source is None:
        source = inputs.file(full)
        progress(message(f"converting to GGUF ({full})"))
        convert(
            inputs.merged, source, full, inputs.cache,
            name=inputs.name, about=inputs.about, trust_remote_code=inputs.trust_remote_code,
        )  # fmt: skip
    importance = _importance(inputs, types, source)
    digests: dict[str, str] = {}
    for number, kind in enumerate(types, 1):
        progress(message(f"making {kind} ({number} of {len(types)})"))
        if inputs.file(kind) != source:
            make_types(source, [kind], inputs.out, inputs.name, importance)
        digests[kind] = digest_of_file(inputs.file(kind))
    if is_temporary:
        source.unlink()
    return digests


def _importance(inputs: GgufInputs, types: Sequence[str], source: Path) -> Imatrix | None:
    """Return the importance matrix, which is measured if the types use one and none was kept."""
    if inputs.measure is not None and not inputs.matrix.exists() and _use_imatrix(types):
        inputs.measure(source, inputs.matrix)
    return imatrix_file.read_imatrix(inputs.matrix) if inputs.matrix.exists() else None


def _use_imatrix(types: Sequence[str]) -> bool:
    return any(kind in IMATRIX_TYPES for kind in types)
