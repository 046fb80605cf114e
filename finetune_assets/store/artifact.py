"""The records of the store: a fingerprint, a published artifact, a foreign entry, and what a step built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune_assets.store.digests import DigestCache, digest_of

FINGERPRINT_LENGTH = 20  # hex digits: 80 bits, and short enough to read aloud


@dataclass(frozen=True)
class Fingerprint:
    """The ingredients of an artifact's identity, and their digest."""

    ingredients: Mapping[str, Any]

    @cached_property
    def hex(self) -> str:
        return digest_of(dict(self.ingredients))[:FINGERPRINT_LENGTH]


@dataclass(frozen=True)
class Artifact:
    """A published folder and its manifest."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def data_version(self) -> str:
        """The version of the content: equal content has equal versions, whatever made it."""
        return self.manifest["data_version"]

    @property
    def metrics(self) -> Mapping[str, Any]:
        return self.manifest["metrics"]

    @property
    def inputs(self) -> Mapping[str, str]:
        """The artifacts that it was made from: asset -> fingerprint."""
        return self.manifest["inputs"]

    @property
    def created(self) -> str:
        """Time of publication, UTC, in ISO 8601: later sorts after earlier."""
        return self.manifest["created"]

    @property
    def size(self) -> int:
        """Total bytes of its files, as published."""
        return sum(record["size"] for record in self.manifest["files"].values())

    def part_version(self, part: str) -> str:
        """Return the data version of one named part (a split, a GGUF type)."""
        return self.manifest["parts"][part]

    def damage(self, digests: DigestCache) -> str | None:
        """Describe the first damaged file on disk, or return None. Reads only files that changed since their digest."""
        for name, record in self.manifest["files"].items():
            path = self.path / name
            try:
                size = path.stat().st_size
                if size != record["size"]:
                    return f"{name} has {size} bytes instead of {record['size']}"
                if digests.file(path) != record["sha256"]:
                    return f"the content of {name} has changed since it was published"
            except FileNotFoundError:
                return f"{name} is gone"
            except OSError as error:
                return f"{name} cannot be read: {error.strerror}"
        return None


@dataclass(frozen=True)
class ForeignEntry:
    """Something in an artifact's place that this release did not write: the reason, and the inputs that it names."""

    why: str
    inputs: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Made:
    """What a step reports about the files in its staging folder.

    Args:
        metrics: JSON-able facts and figures for the manifest and the asset page.
        parts: named parts that downstream assets may read without the rest: part -> its files.
        content: the files whose bytes give the data version; None: all of them.
    """

    metrics: dict[str, Any]
    parts: Mapping[str, list[str]] | None = None
    content: list[str] | None = None
