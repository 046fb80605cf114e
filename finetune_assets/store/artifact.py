"""A published artifact, what it is made of, and what else can stand in its place."""

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
    """What an artifact's identity is made of, in clear, and the digest of it."""

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
        """The content's version: equal content, equal version, whatever made it."""
        return self.manifest["data_version"]

    @property
    def metrics(self) -> Mapping[str, Any]:
        return self.manifest["metrics"]

    @property
    def inputs(self) -> Mapping[str, str]:
        """The artifacts that it was made of: asset -> fingerprint."""
        return self.manifest["inputs"]

    @property
    def created(self) -> str:
        """When it was made, UTC, in ISO 8601: later sorts after earlier."""
        return self.manifest["created"]

    @property
    def size(self) -> int:
        """Bytes of its files, as published."""
        return sum(record["size"] for record in self.manifest["files"].values())

    def part_version(self, part: str) -> str:
        """The data version of one named part (a split, a GGUF type)."""
        return self.manifest["parts"][part]

    def damage(self, digests: DigestCache) -> str | None:
        """What is wrong with the files on disk, or None. Reads only what changed since its digest was taken."""
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
    """Something in an artifact's place that is none of ours: why, in words, and the inputs that it names, if any."""

    why: str
    inputs: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Made:
    """What a step says of what it put into its staging folder.

    Args:
        metrics: JSON-able facts and figures for the manifest and the asset page.
        parts: named parts of the artifact that downstream assets may depend on alone: part -> its files.
        content: the files whose bytes are the data version; None: all of them.
    """

    metrics: dict[str, Any]
    parts: Mapping[str, list[str]] | None = None
    content: list[str] | None = None
