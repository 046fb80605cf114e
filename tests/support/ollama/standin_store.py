"""The model store of the stand-in: Ollama's layout on disk since 0.32.7, and what `create` does since 0.31.2."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_assets.export.gguf.converter import VERSION
from finetune_assets.export.gguf.form import write_in_form
from finetune_assets.models.formats.gguf import TYPE_NAMES, Head, read_head
from finetune_assets.recipe.gguf_types import FILE_TYPES
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.store.digests import digest_of_file

IMAGE = "application/vnd.ollama.image."
CONFIG = "application/vnd.docker.container.image.v1+json"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
NAMES = {number: kind.upper() for kind, number in FILE_TYPES.items()}


class Refused(Exception):
    """A request that the server refuses: the text is its answer."""

    def __init__(self, text: str, status: int = 400):
        super().__init__(text)
        self.status = status


def llama_quantize() -> Path | None:
    """The real tool, where it is: LLAMA_CPP_BIN, or what bench/llama_tools.py built into the cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-assets"
    built = cache / f"llama.cpp-{VERSION}-build" / "bin"
    tool = Path(os.environ.get("LLAMA_CPP_BIN") or built) / "llama-quantize"
    return tool if tool.is_file() else None


def copy_weights(source: Path, target: Path) -> None:
    """`llama-quantize SOURCE TARGET COPY`; where the tool was not built, our own writer of the same form."""
    if (tool := llama_quantize()) is not None:
        done = subprocess.run([str(tool), str(source), str(target), "COPY"], capture_output=True)
        if done.returncode != 0:
            raise Refused("failed to validate GGUF with llama-quantize")
        return
    try:
        write_in_form(source, read_head(source), target)
    except StepFailed as error:
        raise Refused("failed to validate GGUF with llama-quantize") from error


@dataclass(frozen=True)
class Stored:
    """A model in the store."""

    name: str
    digest: str
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    weights: Path
    texts: Mapping[str, list[str]]  # kind of a layer -> its texts

    @property
    def template(self) -> str | None:
        return next(iter(self.texts.get("template", [])), None)

    @property
    def system(self) -> str:
        return next(iter(self.texts.get("system", [])), "")

    @property
    def parameters(self) -> dict[str, Any]:
        return json.loads(next(iter(self.texts.get("params", [])), "{}"))

    @property
    def size(self) -> int:
        return sum(layer["size"] for layer in (self.manifest["config"], *self.manifest["layers"]))


class Store:
    """Models in a folder. `copy` makes the layer of a GGUF file."""

    def __init__(self, folder: Path, copy: Callable[[Path, Path], None]):
        self.folder, self.copy = folder, copy
        (folder / "blobs").mkdir(parents=True, exist_ok=True)

    def blob(self, digest: str) -> Path:
        return self.folder / "blobs" / digest.replace(":", "-")

    def names(self) -> list[str]:
        root = self.folder / "manifests" / "registry.ollama.ai"
        files = sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith("partial-"))
        parts = [path.relative_to(root).parts for path in files]
        return [f"{'/'.join(part[:-1]).removeprefix('library/')}:{part[-1]}" for part in parts]

    def read(self, name: str) -> Stored:
        """A model; with or without `rootfs` in its configuration, which nobody reads."""
        try:
            data = self._manifest(name).read_bytes()
        except OSError as error:
            raise Refused(f"model '{name}' not found", 404) from error
        manifest = json.loads(data)
        config = json.loads(self.blob(manifest["config"]["digest"]).read_bytes())
        texts: dict[str, list[str]] = {}
        weights = Path()
        for layer in manifest["layers"]:
            kind, blob = layer["mediaType"].removeprefix(IMAGE), self.blob(layer["digest"])
            if kind == "model":
                weights = blob
            else:
                texts.setdefault(kind, []).append(blob.read_text(encoding="utf-8"))
        return Stored(_plain(name), hashlib.sha256(data).hexdigest(), manifest, config, weights, texts)

    def create(self, request: Mapping[str, Any]) -> None:
        """Make a model of the GGUF file in a request; LoRA adapters are refused, as since 0.34.1."""
        if request.get("adapters"):
            raise Refused("LoRA adapters are not supported")
        files = request.get("files") or {}
        if len(files) != 1:
            raise Refused("'files' must hold one GGUF file")
        source = self.blob(next(iter(files.values())))
        if not source.is_file():
            raise Refused(f"blob {source.name} is not there")
        made = self.folder / "blobs" / f"{source.name}-copy"
        self.copy(source, made)
        digest = f"sha256:{digest_of_file(made)}"
        size, head = made.stat().st_size, read_head(made)
        made.replace(self.blob(digest))
        layers = [_entry(IMAGE + "model", digest, size)]
        licences = request.get("license") or []
        texts = [("template", request.get("template")), ("system", request.get("system"))]
        texts += [("license", text) for text in ([licences] if isinstance(licences, str) else licences)]
        if parameters := request.get("parameters"):
            texts.append(("params", json.dumps(parameters, sort_keys=True, ensure_ascii=False) + "\n"))
        layers += [_entry(IMAGE + kind, *self._put(text.encode())) for kind, text in texts if text]
        family = head.get("general.architecture")
        config = {
            **{"model_format": "gguf", "model_family": family, "model_families": [family]},
            **{"model_type": f"{head.parameters / 1e6:.2f}M", "file_type": file_type(head)},
            **{"architecture": "amd64", "os": "linux"},
        }
        described = _entry(CONFIG, *self._put(json.dumps(config).encode()))
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described, "layers": layers}
        self._publish(request["model"], json.dumps(manifest).encode())

    def duplicate(self, source: str, target: str) -> None:
        self.read(source)
        self._publish(target, self._manifest(source).read_bytes())

    def delete(self, name: str) -> None:
        self.read(name)
        self._manifest(name).unlink()
        named = "".join(path.read_text() for path in (self.folder / "manifests").rglob("*") if path.is_file())
        for blob in (self.folder / "blobs").glob("sha256-*"):
            if blob.name.replace("-", ":") not in named:
                blob.unlink()

    def _manifest(self, name: str) -> Path:
        path, _, tag = _plain(name).partition(":")
        parts = path.split("/")
        defaults = ["registry.ollama.ai", "library"]
        return Path(self.folder, "manifests", *defaults[: 3 - len(parts)], *parts, tag)

    def _publish(self, name: str, manifest: bytes) -> None:
        place = self._manifest(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        (staging := place.with_name(f"partial-{place.name}")).write_bytes(manifest)
        staging.replace(place)

    def _put(self, data: bytes) -> tuple[str, int]:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.blob(digest).write_bytes(data)
        return digest, len(data)

    def take(self, digest: str, source: Any) -> None:
        """Store a blob that is sent, if its content is that of its name."""
        made = self.folder / "blobs" / f"sha256-{digest[-64:]}-upload"
        with made.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
        if digest != f"sha256:{digest_of_file(made)}":
            made.unlink()
            raise Refused(f"digest mismatch, expected {digest}")
        made.replace(self.blob(digest))


def shown(store: Store, model: Stored, *, verbose: bool) -> dict[str, Any]:
    """A model as /api/show tells of it."""
    head = read_head(model.weights)
    left_out = ("general.name", "tokenizer.chat_template")
    values = {key: head.get(key) for key in sorted(head.raw) if key not in left_out}
    info = {key: None if isinstance(value, list) and not verbose else value for key, value in values.items()}
    lines = [f"FROM {store.folder.resolve() / 'blobs' / model.weights.name}"]
    lines += [f"TEMPLATE {model.template}"] if model.template else []
    parameters = [
        (key, one) for key, value in model.parameters.items() for one in (value if isinstance(value, list) else [value])
    ]
    lines += [f"PARAMETER {key} {value}" for key, value in parameters]
    text = [f"{key:<30} {json.dumps(value, ensure_ascii=False)}" for key, value in parameters]
    told: dict[str, Any] = {"tensors": tensors(head)} if verbose else {}
    return told | {
        "modelfile": "# Modelfile generated by the stand-in\n" + "\n".join(lines) + "\n",
        "parameters": "\n".join(text),
        "template": model.template or "",
        "system": model.system,
        "license": "\n".join(model.texts.get("license", [])),
        "details": details(model),
        "model_info": info | {"general.parameter_count": head.parameters},
        "capabilities": ["completion"],
        "modified_at": "2026-08-21T00:00:00Z",
    }


def tensors(head: Head) -> list[dict[str, Any]]:
    return [
        {"name": tensor.name, "type": TYPE_NAMES[tensor.type_number], "shape": tensor.shape} for tensor in head.tensors
    ]


def details(model: Stored) -> dict[str, Any]:
    config = model.config
    return {
        "parent_model": "",
        "format": config["model_format"],
        "family": config["model_family"],
        "families": config["model_families"],
        "parameter_size": config["model_type"],
        "quantization_level": config["file_type"],
    }


def file_type(head: Head) -> str:
    return NAMES.get(head.get("general.file_type"), "unknown")


def _plain(name: str) -> str:
    plain = name.removeprefix("registry.ollama.ai/").removeprefix("library/")
    return plain if ":" in plain else f"{plain}:latest"


def _entry(media_type: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": size}
