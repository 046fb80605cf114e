"""The check that a server still has the published weights: the same file, or a `llama-quantize COPY` of it.

Published files have the form that such a copy keeps (see `gguf.form`), so digests agree. If a server's copy has a
different digest, its content is compared: the bytes if the server's folder can be read, else what its API
reports.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune_assets.export.gguf.form import cut_texts, in_form, short
from finetune_assets.export.ollama.server import api as ollama_server
from finetune_assets.export.ollama.server.releases import COPIES, release
from finetune_assets.models.engines.ollama_engine import is_loopback
from finetune_assets.models.formats.gguf import TYPE_NAMES, Head, Tensor, read_head
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.store.digests import digest_of_file

BLOCK = 1 << 22  # bytes compared at a time
SOURCE = re.compile(r"^FROM (.*sha256[-:]([0-9a-f]{64}))\s*$", re.MULTILINE)
# metadata that a server omits from its report, or adds
NOT_TOLD = ("general.name", "tokenizer.chat_template")
STORES = (
    "~/.ollama/models",
    "/usr/share/ollama/.ollama/models",
)  # Ollama's default folders, of a user and of its service


def source_of(shown: Mapping[str, Any]) -> str | None:
    """Return the digest (hex) of the weights that a server's /api/show names."""
    source = SOURCE.search(shown.get("modelfile", ""))
    return source[2] if source else None


def compare_content(
    host: str, name: str, shown: Mapping[str, Any], gguf: Path, sha256: str, version: str
) -> tuple[bool, str]:
    """Return whether weights with a different digest are a server's copy of `gguf`, and what was compared.

    Args:
        shown: the server's description of the model (/api/show).
        version: the server's version.
    """
    digest = source_of(shown)
    if digest is None:
        return False, f"the server names no weights instead of {sha256[:12]}"
    differs = f"its digest is {digest[:12]} instead of {sha256[:12]}"
    ours = in_form(cut_texts(read_head(gguf)))
    if (blob := readable_blob(host, shown)) is not None:
        why = difference(blob, digest, gguf)
        same = f"{len(ours.tensors)} tensors and {len(ours.raw)} metadata values are the same byte for byte"
        return why is None, f"{differs}; {f'not a copy: {why}' if why else same}"
    if not copies(version):
        return False, f"{differs}; its bytes cannot be read here, and Ollama {version} makes no copies"
    report = ollama_server.show(host, name, verbose=True)
    if (why := _reported_difference(report, ours)) is not None:
        return False, f"{differs}; not a copy: {why}"
    values = len([key for key in ours.raw if key not in NOT_TOLD])
    return True, (
        f"{differs}; {len(ours.tensors)} tensors have the same names, shapes and types, and {values} metadata values "
        "are the same; its bytes cannot be read here, and were not compared"
    )


def copies(version: str) -> bool:
    """Return whether servers of this version copy weights when they create a model; true for unknown versions."""
    number = release(version)
    return number is None or number >= COPIES


def readable_blob(host: str, shown: Mapping[str, Any]) -> Path | None:
    """Return the file of the weights, if the server is on this machine and the file can be read."""
    source = SOURCE.search(shown.get("modelfile", ""))
    if source is None or not is_loopback(host):
        return None
    given = os.environ.get("OLLAMA_MODELS")
    stores = [Path(store).expanduser() for store in (*([given] if given else []), *STORES)]
    places = [Path(source[1]), *(store / "blobs" / f"sha256-{source[2]}" for store in stores)]
    return next((place for place in places if place.is_absolute() and os.access(place, os.R_OK)), None)


def difference(blob: Path, digest: str, gguf: Path) -> str | None:
    """Return the first difference between a server's file and a `llama-quantize COPY` of ours; None without one.

    Args:
        digest: the blob's digest (hex), which names it on the server.
    """
    try:
        if digest_of_file(blob) != digest:
            return f"{blob} has another content than its name says"
        held, ours = read_head(blob), read_head(gguf)
        theirs, wanted = in_form(cut_texts(held)), in_form(cut_texts(ours))
    except (StepFailed, OSError) as error:
        return error.message if isinstance(error, StepFailed) else f"{blob} cannot be read ({error.strerror})"
    for key in [*wanted.raw, *theirs.raw]:
        if theirs.raw.get(key) != wanted.raw.get(key):
            return f"the metadata value {key} differs"
    if theirs.tensors != wanted.tensors:
        return _table_difference(theirs.tensors, wanted.tensors)
    places = {tensor.name: held.data_start + tensor.offset for tensor in held.tensors}
    with blob.open("rb") as left, gguf.open("rb") as right:
        for tensor in ours.tensors:
            left.seek(places[tensor.name])
            right.seek(ours.data_start + tensor.offset)
            if any(a != b for a, b in _blocks(left, right, tensor.nbytes)):
                return f"tensor {tensor.name} has other weights"
    return None


def _blocks(left: Any, right: Any, size: int) -> Iterator[tuple[bytes, bytes]]:
    while size:
        step = min(size, BLOCK)
        yield left.read(step), right.read(step)
        size -= step


def _table_difference(theirs: tuple[Tensor, ...], ours: tuple[Tensor, ...]) -> str:
    held = {tensor.name: tensor for tensor in theirs}
    for tensor in ours:
        if (other := held.pop(tensor.name, None)) is None:
            return f"there is no tensor {tensor.name}"
        if (other.type, other.shape) != (tensor.type, tensor.shape):
            return f"tensor {tensor.name} is {other.type} {other.shape} instead of {tensor.type} {tensor.shape}"
    return f"there is a tensor {next(iter(held), 'table of another order')} too many"


def _reported_difference(report: Mapping[str, Any], ours: Head) -> str | None:
    """Return the first difference between a server's report of the file and ours; None without one."""
    tensors = {entry["name"]: (entry["type"], short(tuple(entry["shape"]))) for entry in report.get("tensors") or []}
    wanted = {tensor.name: (TYPE_NAMES[tensor.type_number], tensor.shape) for tensor in ours.tensors}
    for name in [*wanted, *tensors]:
        if tensors.get(name) != wanted.get(name):
            return f"tensor {name} is {tensors.get(name, 'not there')} instead of {wanted.get(name, 'not there')}"
    info = report.get("model_info") or {}
    for key in ours.raw:
        if key not in NOT_TOLD and (key not in info or not _equal(info[key], ours.get(key))):
            return f"the metadata value {key} differs"
    return None


def _equal(reported: Any, ours: Any) -> bool:
    """Return whether a JSON value equals one of the file, where fractions are float32."""
    if isinstance(ours, list):
        return isinstance(reported, list) and len(reported) == len(ours) and all(map(_equal, reported, ours))
    if isinstance(ours, float) and isinstance(reported, (int, float)):
        return math.isclose(reported, ours, rel_tol=1e-6) or (math.isnan(ours) and math.isnan(reported))
    return reported == ours
