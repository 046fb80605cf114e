"""A model written straight into an Ollama model store, without a server.

The layout is Ollama's: blobs/sha256-HEX, and manifests/HOST/NAMESPACE/NAME/TAG naming them. The bytes of every blob
are the ones that a server would write since 0.32.7 (but that a server calls the type of f32 files "unknown"); earlier
ones repeat the layers' digests in the configuration (rootfs), and read one without them. The manifest comes last and in
one step, so a model is whole or not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.export.ollama.modelfile import OllamaModel
from finetune_assets.models.formats.gguf import read_head
from finetune_assets.recipe.gguf_types import FILE_TYPES
from finetune_assets.reporting.errors import BadInput, StepFailed
from finetune_assets.store.digests import digest_of_file
from finetune_assets.store.files import write_atomically

if TYPE_CHECKING:
    from filelock import FileLock

IMAGE = "application/vnd.ollama.image."
CONFIG = "application/vnd.docker.container.image.v1+json"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
BLOB_NAME = len("sha256-") + 64
PARTIAL = "partial-"  # begins the names of files that are being written
FILE_TYPE_NAMES = {number: kind.upper() for kind, number in FILE_TYPES.items()}  # Ollama's: Q4_K_M


@dataclass(frozen=True)
class Layer:
    """A blob in a manifest: media type without Ollama's prefix, "sha256:HEX", bytes."""

    kind: str
    digest: str
    size: int


@dataclass(frozen=True)
class Published:
    """A model that is there: `digest` is the manifest's sha256 (what `ollama list` shows, in full)."""

    name: str
    digest: str
    layers: tuple[Layer, ...]


def write(models_dir: Path, models: Sequence[OllamaModel]) -> dict[str, Published]:
    """Publish models in the store `models_dir`, none before the blobs of all are there; by name.

    The weights are a hard link where the file system allows, else a copy, whose bytes are checked on the way.

    Raises:
        StepFailed: a file is not a GGUF file, or not the one on record.
        BadInput: a name is not a model name.
    """
    places = {model.name: manifest_path(models_dir, model.name) for model in models}
    (models_dir / "blobs").mkdir(parents=True, exist_ok=True)
    manifests = {model.name: _fill(models_dir, model) for model in models}
    made: dict[str, Published] = {}
    for name, manifest in manifests.items():
        places[name].parent.mkdir(parents=True, exist_ok=True)
        write_atomically(places[name], manifest, prefix=PARTIAL)
        made[name] = Published(name, hashlib.sha256(manifest).hexdigest(), layers_of(json.loads(manifest)))
    return made


def remove(models_dir: Path, name: str) -> None:
    """Take a model away. Its blobs stay until they are collected."""
    manifest_path(models_dir, name).unlink(missing_ok=True)


def contents(model: OllamaModel) -> dict[str, list[bytes]]:
    """Return the bytes of a model's layers except the weights, by kind, in the order of its manifest."""
    texts = [("template", model.template), ("system", model.system or ""), *(("license", x) for x in model.licenses)]
    found: dict[str, list[bytes]] = {}
    for kind, text in texts:
        if text:
            found.setdefault(kind, []).append(text.encode())
    if model.parameters:
        found["params"] = [go_json(_numbers(model.parameters))]
    return found


def read(models_dir: Path, name: str) -> str | None:
    """Return the digest of a published model; None if it is not there, or a blob of it is missing or cut short."""
    try:
        manifest = manifest_path(models_dir, name).read_bytes()
        described = json.loads(manifest)
        for layer in (described["config"], *described["layers"]):
            if blob_path(models_dir, layer["digest"]).stat().st_size != layer["size"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return hashlib.sha256(manifest).hexdigest()


def blob_path(models_dir: Path, digest: str) -> Path:
    """Return where the blob of a digest ("sha256:HEX") lies."""
    return models_dir / "blobs" / digest.replace(":", "-")


def lock(models_dir: Path) -> FileLock:
    """Return the lock, not yet taken, for writing models and removing blobs: new blobs have no manifest yet."""
    from filelock import FileLock

    return FileLock(models_dir / ".lock")


def digests(models_dir: Path) -> set[str]:
    """Return the digests of all models in the store."""
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in _manifests(models_dir)}


def unreferenced(models_dir: Path) -> list[Path]:
    """Return blobs that no manifest names, and what killed writers left. Ask with the lock held."""
    blobs, named = models_dir / "blobs", set()
    for path in _manifests(models_dir):
        named |= {f"sha256-{found.decode()}" for found in re.findall(rb"sha256[:-]([0-9a-f]{64})", path.read_bytes())}
    # a server's unfinished downloads have longer names; it takes them up again
    loose = [path for path in blobs.glob("sha256-*") if len(path.name) == BLOB_NAME and path.name not in named]
    left = [*blobs.glob(f"{PARTIAL}*"), *(models_dir / "manifests").rglob(f"{PARTIAL}*")]
    return sorted([*loose, *left])


def manifest_path(models_dir: Path, name: str) -> Path:
    """Return where a model's manifest is. BadInput if the name is not a model name."""
    path, _, tag = name.partition(":")
    parts = path.split("/")
    if not 1 <= len(parts) <= 3 or not all(re.fullmatch(r"\w[\w.-]*", part) for part in [*parts, tag or "latest"]):
        raise BadInput(f"{name!r} is not an Ollama model name", "write it like model, namespace/model or model:tag")
    defaults = ["registry.ollama.ai", "library"]
    return Path(models_dir, "manifests", *defaults[: 3 - len(parts)], *parts, tag or "latest")


def layers_of(manifest: Mapping[str, Any]) -> tuple[Layer, ...]:
    """Return the layers that a manifest names."""
    return tuple(
        Layer(layer["mediaType"].removeprefix(IMAGE), layer["digest"], layer["size"]) for layer in manifest["layers"]
    )


def go_json(value: Any) -> bytes:
    """Return JSON as Go's encoder writes it: no spaces, some characters escaped, a newline at the end."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return (text + "\n").encode()


def human_number(count: int) -> str:
    """Return a number of weights as Ollama abbreviates it: 134.52M, 8B, 8.0B."""
    if count >= 10**9:
        return f"{count / 1e9:.0f}B" if count % 10**9 == 0 else f"{count / 1e9:.1f}B"
    if count >= 10**6:
        return f"{count / 1e6:.0f}M" if count % 10**6 == 0 else f"{count / 1e6:.2f}M"
    return f"{count / 1e3:.0f}K" if count >= 1000 else str(count)


def _manifests(models_dir: Path) -> list[Path]:
    files = (path for path in (models_dir / "manifests").rglob("*") if path.is_file())
    return [path for path in files if not path.name.startswith(PARTIAL)]


def _numbers(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Sort by name, and make whole floats integers: as Go writes a map."""
    whole = {key: int(v) if isinstance(v, float) and v.is_integer() else v for key, v in parameters.items()}
    return dict(sorted(whole.items()))


def _fill(models_dir: Path, model: OllamaModel) -> bytes:
    """Write a model's blobs, and return its manifest."""
    head = read_head(model.gguf)
    layers = [_entry(IMAGE + "model", *_link(models_dir, model.gguf, model.sha256))]
    for kind, blobs in contents(model).items():
        layers += [_entry(IMAGE + kind, *_put(models_dir, data)) for data in blobs]
    family = head.get("general.architecture")
    config = {
        "model_format": "gguf",
        "model_family": family,
        "model_families": [family],
        "model_type": human_number(head.parameters),
        "file_type": FILE_TYPE_NAMES.get(head.get("general.file_type"), "unknown"),
        "architecture": "amd64",
        "os": "linux",
    }
    return go_json(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": _entry(CONFIG, *_put(models_dir, go_json(config))),
            "layers": layers,
        }
    )


def _entry(media_type: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": size}


def _put(models_dir: Path, data: bytes) -> tuple[str, int]:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    blob = blob_path(models_dir, digest)
    if not (blob.is_file() and blob.read_bytes() == data):
        write_atomically(blob, data, prefix=PARTIAL)
    return digest, len(data)


def _link(models_dir: Path, file: Path, sha256: str) -> tuple[str, int]:
    digest, size = f"sha256:{sha256}", file.stat().st_size
    blob = blob_path(models_dir, digest)
    if not (blob.is_file() and (blob.samefile(file) or digest_of_file(blob) == sha256)):
        with tempfile.TemporaryDirectory(dir=blob.parent, prefix=PARTIAL) as staging:
            link = Path(staging) / blob.name
            try:
                os.link(file, link)
            except OSError:
                _copy(file, link, sha256)
            link.replace(blob)
    return digest, size


def _copy(file: Path, target: Path, sha256: str) -> None:
    found = hashlib.sha256()
    with file.open("rb") as source, target.open("wb") as copy:
        while block := source.read(1 << 20):
            found.update(block)
            copy.write(block)
    if found.hexdigest() != sha256:
        raise StepFailed(f"{file} has changed since it was published", "materialise gguf_file again")
