"""Published artifacts: folders that are whole or not there, each with a manifest of what made it.

Layout: `<store>/<recipe>/<asset>/<fingerprint>/` with `manifest.json` inside; beside the artifacts of an asset lie
`CURRENT` (the fingerprint last materialised), a lock file, and staging folders while something is being built. What is
none of ours counts as missing and is never deleted: where its place is needed it is renamed to `set-aside-...`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.inputs.regular_files import open_regular
from finetune_assets.machine.disk import disk_trouble
from finetune_assets.reporting.errors import FinetuneError, StepFailed
from finetune_assets.reporting.masking import masked
from finetune_assets.store.digests import DigestCache, digest_of, digest_of_files, files_below
from finetune_assets.store.manifest import MANIFEST, MANIFEST_VERSION, Unreadable, manifest_damage, read_manifest
from finetune_assets.store.set_aside import set_aside

if TYPE_CHECKING:
    from filelock import FileLock

CURRENT = "CURRENT"
STAGING = ".staging-"  # folders of this prefix hold nothing that counts: whoever holds the asset's lock sweeps them
LONGEST_POINTER = 100  # bytes
VERBATIM = ("template", "system", "parameters", "modelfile", "samples")  # metrics that are served, or are data
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
class Stranger:
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


class ArtifactStore:
    """Artifacts of every recipe, below one folder."""

    def __init__(self, root: Path, digests: DigestCache):
        self.root = root
        self.digests = digests

    def folder(self, recipe: str, asset: str) -> Path:
        return self.root / recipe / asset

    def get(self, recipe: str, asset: str, fingerprint: str) -> Artifact | None:
        """The artifact with this fingerprint, if it was published and its manifest can be understood."""
        found = self._look(recipe, asset, fingerprint)
        return found if isinstance(found, Artifact) else None

    def stranger(self, recipe: str, asset: str, name: str) -> Stranger | None:
        """What lies under this name without being an artifact of ours, if anything does."""
        found = self._look(recipe, asset, name)
        return found if isinstance(found, Stranger) else None

    def _look(self, recipe: str, asset: str, name: str) -> Artifact | Stranger | None:
        path = self.folder(recipe, asset) / name
        try:
            if not path.is_dir():
                return Stranger("not an artifact") if os.path.lexists(path) else None
            found = read_manifest(path / MANIFEST)
        except FileNotFoundError:
            return Stranger("it has no manifest")
        except (OSError, Unreadable):
            return Stranger("its manifest cannot be read")
        if not isinstance(found, dict):
            return Stranger("its manifest is not ours")
        version, inputs = found.get("version"), found.get("inputs")
        named = {str(key): str(value) for key, value in inputs.items()} if isinstance(inputs, dict) else {}
        if isinstance(version, int) and version > MANIFEST_VERSION:
            return Stranger("made by a later release", named)
        wanted = {"version": MANIFEST_VERSION, "recipe": recipe, "asset": asset, "fingerprint": name}
        if any(found.get(key) != value for key, value in wanted.items()):
            return Stranger("its manifest is not ours", named)
        if (damage := manifest_damage(found)) is not None:
            return Stranger(f"its manifest is damaged: {damage}", named)
        return Artifact(path, found)

    def published(self, recipe: str, asset: str) -> list[Artifact]:
        """Every artifact of an asset, the one made first coming first."""
        folder = self.folder(recipe, asset)
        names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
        found = [artifact for name in names if (artifact := self.get(recipe, asset, name)) is not None]
        return sorted(found, key=lambda artifact: artifact.created)

    def current(self, recipe: str, asset: str) -> Artifact | None:
        """The artifact that was materialised last."""
        fingerprint = _pointed_to(self.folder(recipe, asset) / CURRENT)
        return self.get(recipe, asset, fingerprint) if fingerprint else None

    def lost_current(self, recipe: str, asset: str) -> str | None:
        """Why what was materialised last, if there is a record of it, is not there to go by."""
        pointer = self.folder(recipe, asset) / CURRENT
        fingerprint = _pointed_to(pointer)
        if fingerprint is None:
            return f"{CURRENT} is not ours" if os.path.lexists(pointer) else None
        stranger = self._look(recipe, asset, fingerprint)
        if isinstance(stranger, Artifact):
            return None
        return f"{fingerprint}: {stranger.why if stranger else 'it is gone'}"

    def make_current(self, artifact: Artifact) -> None:
        """Record that this artifact is what the asset was last materialised to.

        Raises:
            StepFailed: the store cannot be written.
        """
        pointer = artifact.path.parent / CURRENT
        try:
            fingerprint = _pointed_to(pointer)
            if fingerprint is None and os.path.lexists(pointer):
                set_aside(pointer)
            if fingerprint != artifact.fingerprint:
                write_atomically(pointer, f"{artifact.fingerprint}\n".encode())
        except OSError as error:
            if (failure := disk_trouble(error, pointer.parent, outcome="what was published stays")) is None:
                raise
            raise failure from error

    def lock(self, recipe: str, asset: str) -> FileLock:
        """The lock, not yet taken, of whoever adds to an asset's folder, which has to be there, or takes from it."""
        from filelock import FileLock

        return FileLock(self.folder(recipe, asset) / ".lock")

    @contextmanager
    def _locked(self, recipe: str, asset: str, waits: Callable[[], None]) -> Iterator[None]:
        from filelock import Timeout

        lock = self.lock(recipe, asset)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waits()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def building(
        self, recipe: str, asset: str, fingerprint: str, waits: Callable[[], None] = lambda: None
    ) -> Iterator[Path]:
        """Hold the asset's lock and give an empty staging folder, removed at the end unless published.

        A second builder of the same asset waits here. Folders left by builders that were killed are swept first: the
        lock proves that nobody is at work in them.

        Args:
            waits: called when another builder is at work.

        Raises:
            StepFailed: the store cannot be written.
        """
        folder = self.folder(recipe, asset)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked(recipe, asset, waits):
                for left in folder.glob(f"{STAGING}*"):
                    discard(left)
                staging = Path(tempfile.mkdtemp(prefix=f"{STAGING}{fingerprint}-", dir=folder))
                staging.chmod(0o755)
                try:
                    yield staging
                finally:
                    shutil.rmtree(staging, ignore_errors=True)
        except FinetuneError:
            raise
        except Exception as error:
            if (failure := disk_trouble(error, folder)) is None:
                raise
            raise failure from error

    def publish(
        self, staging: Path, recipe: str, asset: str, fingerprint: Fingerprint, made: Made, record: Mapping[str, Any]
    ) -> Artifact:
        """Turn a staging folder into a published artifact, in one rename.

        It is dated now, or right after what the asset has already, if the clock was set back: the order of the dates is
        the order of publication. A stranger under its name is set aside. The caller holds the asset's lock.

        Args:
            record: what else the manifest shall say (libraries, seed, ...).
        """
        target = self.folder(recipe, asset) / fingerprint.hex
        content = files_below(staging)
        if MANIFEST in content:
            raise StepFailed(
                f"{recipe}/{asset} cannot be published: it holds a file {MANIFEST}, the name of the store's own record",
                "leave that file out, or give it another name",
            )
        self.digests.settle(content.values())
        files = {
            name: {"size": path.stat().st_size, "sha256": self.digests.file(path)} for name, path in content.items()
        }
        sha256 = {name: entry["sha256"] for name, entry in files.items()}
        manifest = {
            "version": MANIFEST_VERSION,
            "recipe": recipe,
            "asset": asset,
            "fingerprint": fingerprint.hex,
            "ingredients": dict(fingerprint.ingredients),
            "data_version": digest_of_files(
                {name: sha256[name] for name in (sha256 if made.content is None else made.content)}
            )[:FINGERPRINT_LENGTH],
            "parts": {
                part: digest_of_files({name: sha256[name] for name in names})[:FINGERPRINT_LENGTH]
                for part, names in (made.parts or {}).items()
            },
            "files": files,
            "metrics": masked(made.metrics, but=VERBATIM),
            **record,
            "created": self._next_date(recipe, asset),
        }
        if (damage := manifest_damage(json.loads(_text_of(manifest)))) is not None:
            raise StepFailed(f"{recipe}/{asset} cannot be published: its manifest would be damaged: {damage}")
        for path in content.values():
            _fsync(path)
        _write_manifest(staging, manifest)
        old = None
        if self.stranger(recipe, asset, fingerprint.hex) is not None:
            set_aside(target)
        elif target.exists():
            old = target.with_name(f"{STAGING}replaced-{fingerprint.hex}")
            target.rename(old)
        staging.rename(target)
        _fsync(target.parent)
        if old is not None:
            discard(old)
        return Artifact(target, manifest)

    def amend(self, artifact: Artifact, metrics: Mapping[str, Any]) -> Artifact:
        """Replace the metrics in a manifest: for facts about where an artifact is used, not about what it is."""
        manifest = {**artifact.manifest, "metrics": masked(dict(metrics), but=VERBATIM)}
        _write_manifest(artifact.path, manifest)
        return Artifact(artifact.path, manifest)

    def remove(self, artifact: Artifact) -> None:
        """Take an artifact away, in one rename; the caller holds the asset's lock.

        Killed before the end, this leaves a folder to be swept, and no artifact with half its files.
        """
        folder = artifact.path.parent
        if _pointed_to(folder / CURRENT) == artifact.fingerprint:
            (folder / CURRENT).unlink()
        trash = folder / f"{STAGING}removed-{artifact.fingerprint}"
        artifact.path.rename(trash)
        _fsync(folder)
        shutil.rmtree(trash)

    def _next_date(self, recipe: str, asset: str) -> str:
        now = datetime.now(UTC)
        if made := self.published(recipe, asset):
            last = _moment(made[-1].created)
            assert last is not None
            now = max(now, last + timedelta(milliseconds=1))
        return now.isoformat(timespec="milliseconds")


def discard(folder: Path) -> None:
    """Delete a folder as far as that can be done; of a link to one, the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path: Path, data: bytes, *, prefix: str | None = None) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    Args:
        prefix: begins the name of the file in the making, by which what a crash left is known; `.NAME-` if not given.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-" if prefix is None else prefix, dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _pointed_to(pointer: Path) -> str | None:
    """The fingerprint that a pointer names; None where it is not there, or not one of ours."""
    try:
        with open_regular(pointer) as file:
            text = file.read(LONGEST_POINTER).decode().strip()
    except (OSError, ValueError):
        return None
    return text if re.fullmatch(r"[0-9a-f]+", text) else None


def _moment(created: object) -> datetime | None:
    """A manifest's date, UTC."""
    try:
        return datetime.fromisoformat(str(created)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    write_atomically(folder / MANIFEST, _text_of(manifest).encode())


def _text_of(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
