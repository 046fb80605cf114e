"""The schema of a manifest: all that readers rely on, checked once when a manifest is read.

A manifest that violates it is damaged, or was written by a different program: its folder is a foreign entry.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from finetune_assets.inputs.pydantic_errors import cause, dotted
from finetune_assets.inputs.regular_files import open_regular

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
LARGEST = 64 * 2**20  # bytes; real manifests have a few thousand
DEEPEST = 64  # levels of nested objects and lists
LONGEST_NUMBER = 2**63  # larger than any size, count or seed
LATEST_YEAR = 9000  # leaves room: the next artifact is dated later


class Unreadable(Exception):
    """The reason why a manifest cannot be read."""


def _plain_name(text: str) -> str:
    path = PurePosixPath(text)
    if not text or path.is_absolute() or ".." in path.parts or "\0" in text or text in (".", MANIFEST):
        raise ValueError("not the name of a file inside the artifact")
    return text


def _key(text: str) -> str:
    if not text or text in (".", "..") or "/" in text or "\0" in text:
        raise ValueError("not a name")
    return text


def _date(text: str) -> str:
    try:
        date = datetime.fromisoformat(text)
        if date.utcoffset() is None or date.year > LATEST_YEAR or date.astimezone(UTC).isoformat() == "":
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError("not a date") from None
    return text


Count = Annotated[int, Field(ge=0, lt=LONGEST_NUMBER)]
Figure = Annotated[float, Field(allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, AfterValidator(_plain_name)]
Key = Annotated[str, AfterValidator(_key)]


class _Shape(BaseModel):
    """The base of all schemas: keys that a later release adds are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class FileRecord(_Shape):
    """A file of an artifact, as it was published."""

    size: Count
    sha256: Sha256


class Ingredients(_Shape):
    """The values that the fingerprint is a digest of."""

    asset: str
    upstreams: dict[str, str]
    code_version: str
    recipe: dict[str, Any]
    sources: dict[str, str]
    tools: dict[str, str]


class Manifest(_Shape):
    """A manifest of any asset; only the metrics that the classes below name are checked."""

    version: Literal[1]
    recipe: str
    asset: str
    fingerprint: Key
    ingredients: Ingredients
    data_version: str
    parts: dict[str, str]
    files: dict[FileName, FileRecord]
    metrics: dict[str, Any]
    inputs: dict[Key, Key]
    created: Annotated[str, AfterValidator(_date)]
    seed: int
    seconds: Annotated[Figure, Field(ge=0)]
    libraries: dict[str, str]

    @model_validator(mode="after")
    def _agrees(self) -> Manifest:
        if missing := {key.partition("/")[0] for key in self.ingredients.upstreams} - set(self.inputs):
            raise ValueError(f"inputs: no {min(missing)}")
        return self


class DataMetrics(_Shape):
    """Metrics of dataset_info."""

    rows: dict[str, Count]
    duplicates_dropped: Count | None = None


class BaseMetrics(_Shape):
    """Metrics of base_model."""

    source: str | None = None
    revision: str | None = None


class AdapterMetrics(_Shape):
    """Metrics of lora_adapter."""

    rows: Annotated[Figure, Field(ge=0)] | None = None
    epochs: Annotated[Figure, Field(ge=0)] | None = None
    seconds: Annotated[Figure, Field(ge=0)] | None = None
    device: str | None = None
    precision: str | None = None


class Side(_Shape):
    """Scores of one model; null: not measured."""

    bleu_4: Figure | None = Field(None, alias="bleu-4")
    rouge_1: Figure | None = Field(None, alias="rouge-1")
    rouge_2: Figure | None = Field(None, alias="rouge-2")
    rouge_l: Figure | None = Field(None, alias="rouge-l")
    perplexity: Figure | None = None


class EvalMetrics(_Shape):
    """Metrics of eval_metrics."""

    rows: Count
    base: Side | None = None
    tuned: Side | None = None


class TypeRecord(_Shape):
    """One GGUF file."""

    file: FileName
    bytes: Count | None = None
    kl: Figure | None = None
    top1: Figure | None = None


class GgufMetrics(_Shape):
    """Metrics of gguf_file."""

    types: Annotated[dict[str, TypeRecord], Field(min_length=1)]


class ServedModel(_Shape):
    """One name in Ollama."""

    type: str
    file: FileName
    sha256: Sha256


class OllamaMetrics(_Shape):
    """Metrics of ollama_model."""

    name: str
    where: Literal["server", "store"]
    place: str
    models: Annotated[dict[str, ServedModel], Field(min_length=1)] | None = None
    template: str | None = None
    system: str | None = None
    parameters: dict[str, str | int | Figure | bool | list[str]] | None = None
    modelfile: str | None = None
    notes: list[str] | None = None
    digest: str | None = None
    digests: dict[str, str] | None = None
    previous: dict[str, str | None] | None = None
    asked: str | None = None


METRICS: Mapping[str, type[_Shape]] = {
    "dataset_info": DataMetrics,
    "base_model": BaseMetrics,
    "lora_adapter": AdapterMetrics,
    "eval_metrics": EvalMetrics,
    "gguf_file": GgufMetrics,
    "ollama_model": OllamaMetrics,
}
SPLITS = {"train", "validation", "test"}


def read_manifest(path: Path) -> Any:
    """Read a manifest as JSON: only finite numbers of limited length, and text that UTF-8 can encode.

    Raises:
        FileNotFoundError: the file does not exist.
        Unreadable: it is not a regular file, too large, not JSON, or JSON that no release writes.
    """
    try:
        with open_regular(path) as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise Unreadable("too large")
        value = json.loads(data.decode("utf-8"), parse_constant=_refused, parse_int=_whole, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # lone surrogates
        if _deeper(value, DEEPEST):
            raise Unreadable("nested too deeply")
        return value
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable(str(error)) from error


def manifest_damage(value: Any) -> str | None:
    """Describe the first violation in a manifest, or return None if it is valid."""
    try:
        manifest = Manifest.model_validate(value)
        if (shape := METRICS.get(manifest.asset)) is not None:
            shape.model_validate(manifest.metrics)
    except ValidationError as error:
        return _first(error, manifest_key="metrics" if error.title != Manifest.__name__ else None)
    except RecursionError:
        return "nested too deeply"
    return _inconsistent(manifest)


def _inconsistent(manifest: Manifest) -> str | None:
    """Describe the first name in a manifest whose entry elsewhere in it is missing, or return None."""
    if manifest.asset == "dataset_info" and (missing := SPLITS - set(manifest.parts)):
        return f"no parts.{min(missing)}"
    if manifest.asset == "gguf_file":
        for kind, entry in GgufMetrics.model_validate(manifest.metrics).types.items():
            if kind not in manifest.parts:
                return f"no parts.{kind}"
            if entry.file not in manifest.files:
                return f"no files.{entry.file}"
    if manifest.asset == "ollama_model":
        facts = OllamaMetrics.model_validate(manifest.metrics)
        if "gguf_file" not in manifest.inputs:
            return "no inputs.gguf_file"
        if facts.models is not None and facts.digests is not None and set(facts.models) != set(facts.digests):
            return "no metrics.digests of its models"
    return None


def _first(error: ValidationError, manifest_key: str | None) -> str:
    """`no created` for what is missing or altogether another thing, else where it is and what is wrong with it."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    key = dotted((*([manifest_key] if manifest_key else []), *first["loc"]))
    if first["type"] == "missing" or (key and "." not in key):
        return f"no {key}"
    return f"{key}: {cause(first)}" if key else cause(first)


def _refused(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _whole(text: str) -> int:
    if len(text) > 20 or abs(int(text)) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    if len(text) > 100 or not math.isfinite(float(text)):
        raise ValueError(f"a number of {len(text)} digits")
    return float(text)


def _deeper(value: Any, levels: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_deeper(item, levels - 1) for item in inside)
