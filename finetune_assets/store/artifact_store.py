"""The store of published artifacts: folders that are whole or absent, each with a manifest.

Layout: `<store>/<recipe>/<asset>/<fingerprint>/` with `manifest.json` inside. Next to the artifacts of an asset are
`CURRENT` (the fingerprint last materialised), a lock file, and staging folders during a build. A foreign entry counts
as missing and is never deleted: it is renamed to `set-aside-...` when its place is needed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.inputs.regular_files import open_regular
from finetune_assets.machine.disk import disk_trouble
from finetune_assets.reporting.errors import FinetuneError, StepFailed
from finetune_assets.reporting.masking import masked
from finetune_assets.store.artifact import FINGERPRINT_LENGTH, Artifact, Fingerprint, ForeignEntry, Made
from finetune_assets.store.digests import DigestCache, digest_of_files, files_below
from finetune_assets.store.files import discard, fsync, set_aside, write_atomically
from finetune_assets.store.manifest import MANIFEST, MANIFEST_VERSION, Unreadable, manifest_damage, read_manifest

if TYPE_CHECKING:
    from filelock import FileLock

CURRENT = "CURRENT"
STAGING = ".staging-"  # folders with this prefix are temporary: whoever holds the asset's lock may delete them
LONGEST_POINTER = 100  # bytes
VERBATIM = (
    "template",
    "system",
    "parameters",
    "modelfile",
    "samples",
)  # metrics that are served, or are data: not masked


class ArtifactStore:
    """The artifacts of every recipe, in one folder."""

    def __init__(self, root: Path, digests: DigestCache):
        self.root = root
        self.digests = digests

    def folder(self, recipe: str, asset: str) -> Path:
        return self.root / recipe / asset

    def get(self, recipe: str, asset: str, fingerprint: str) -> Artifact | None:
        """Return the artifact with this fingerprint, if it was published and its manifest is valid."""
        entry = self._look(recipe, asset, fingerprint)
        return entry if isinstance(entry, Artifact) else None

    def foreign_entry(self, recipe: str, asset: str, name: str) -> ForeignEntry | None:
        """Return what has this name without being a valid artifact, if anything does."""
        entry = self._look(recipe, asset, name)
        return entry if isinstance(entry, ForeignEntry) else None

    def _look(self, recipe: str, asset: str, name: str) -> Artifact | ForeignEntry | None:
        path = self.folder(recipe, asset) / name
        try:
            if not path.is_dir():
                return ForeignEntry("not an artifact") if os.path.lexists(path) else None
            manifest = read_manifest(path / MANIFEST)
        except FileNotFoundError:
            return ForeignEntry("it has no manifest")
        except (OSError, Unreadable):
            return ForeignEntry("its manifest cannot be read")
        if not isinstance(manifest, dict):
            return ForeignEntry("its manifest is foreign")
        version, inputs = manifest.get("version"), manifest.get("inputs")
        named = {str(key): str(value) for key, value in inputs.items()} if isinstance(inputs, dict) else {}
        if isinstance(version, int) and version > MANIFEST_VERSION:
            return ForeignEntry("made by a later release", named)
        expected = {"version": MANIFEST_VERSION, "recipe": recipe, "asset": asset, "fingerprint": name}
        if any(manifest.get(key) != value for key, value in expected.items()):
            return ForeignEntry("its manifest is foreign", named)
        if (damage := manifest_damage(manifest)) is not None:
            return ForeignEntry(f"its manifest is damaged: {damage}", named)
        return Artifact(path, manifest)

    def published(self, recipe: str, asset: str) -> list[Artifact]:
        """Return every artifact of an asset, in the order of publication."""
        folder = self.folder(recipe, asset)
        names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
        artifacts = [artifact for name in names if (artifact := self.get(recipe, asset, name)) is not None]
        return sorted(artifacts, key=lambda artifact: artifact.created)

    def current(self, recipe: str, asset: str) -> Artifact | None:
        """Return the artifact that was materialised last."""
        fingerprint = _pointed_to(self.folder(recipe, asset) / CURRENT)
        return self.get(recipe, asset, fingerprint) if fingerprint else None

    def lost_current(self, recipe: str, asset: str) -> str | None:
        """Return why the artifact that was materialised last cannot be used; None if it can, or never was."""
        pointer = self.folder(recipe, asset) / CURRENT
        fingerprint = _pointed_to(pointer)
        if fingerprint is None:
            return f"{CURRENT} is foreign" if os.path.lexists(pointer) else None
        entry = self._look(recipe, asset, fingerprint)
        if isinstance(entry, Artifact):
            return None
        return f"{fingerprint}: {entry.why if entry else 'it is gone'}"

    def make_current(self, artifact: Artifact) -> None:
        """Record this artifact as the one that was materialised last.

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
        """Return the lock, not yet taken, for adding to or removing from an asset's folder, which must exist."""
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
        """Hold the asset's lock and yield an empty staging folder, which is removed at the end unless published.

        A second builder of the same asset waits here. Folders left by killed builders are deleted first: the lock
        proves that no builder uses them.

        Args:
            waits: called if a different builder holds the lock.

        Raises:
            StepFailed: the store cannot be written.
        """
        folder = self.folder(recipe, asset)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked(recipe, asset, waits):
                for abandoned in folder.glob(f"{STAGING}*"):
                    discard(abandoned)
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

        The date is now, or right after the asset's newest artifact if the clock was set back: dates keep the order of
        publication. A foreign entry with its name is set aside. The caller holds the asset's lock.

        Args:
            record: more keys of the manifest (libraries, seed, ...).
        """
        content = files_below(staging)
        if MANIFEST in content:
            raise StepFailed(
                f"{recipe}/{asset} cannot be published: it holds a file {MANIFEST}, a name that the store reserves",
                "omit that file, or rename it",
            )
        manifest = self._manifest(content, recipe, asset, fingerprint, made, record)
        if (damage := manifest_damage(json.loads(_text_of(manifest)))) is not None:
            raise StepFailed(f"{recipe}/{asset} cannot be published: its manifest would be damaged: {damage}")
        for path in content.values():
            fsync(path)
        _write_manifest(staging, manifest)
        return Artifact(self._into_place(staging, recipe, asset, fingerprint.hex), manifest)

    def _manifest(
        self,
        content: Mapping[str, Path],
        recipe: str,
        asset: str,
        fingerprint: Fingerprint,
        made: Made,
        record: Mapping[str, Any],
    ) -> dict[str, Any]:
        self.digests.settle(content.values())
        files = {
            name: {"size": path.stat().st_size, "sha256": self.digests.file(path)} for name, path in content.items()
        }

        def version(names: Iterable[str]) -> str:
            return digest_of_files({name: files[name]["sha256"] for name in names})[:FINGERPRINT_LENGTH]

        return {
            "version": MANIFEST_VERSION,
            "recipe": recipe,
            "asset": asset,
            "fingerprint": fingerprint.hex,
            "ingredients": dict(fingerprint.ingredients),
            "data_version": version(files if made.content is None else made.content),
            "parts": {part: version(names) for part, names in (made.parts or {}).items()},
            "files": files,
            "metrics": masked(made.metrics, but=VERBATIM),
            **record,
            "created": self._next_date(recipe, asset),
        }

    def _into_place(self, staging: Path, recipe: str, asset: str, name: str) -> Path:
        """Rename a staging folder to its fingerprint; replace an artifact with that name, set a foreign entry aside."""
        target = self.folder(recipe, asset) / name
        replaced = None
        if self.foreign_entry(recipe, asset, name) is not None:
            set_aside(target)
        elif target.exists():
            replaced = target.with_name(f"{STAGING}replaced-{name}")
            target.rename(replaced)
        staging.rename(target)
        fsync(target.parent)
        if replaced is not None:
            discard(replaced)
        return target

    def amend(self, artifact: Artifact, metrics: Mapping[str, Any]) -> Artifact:
        """Replace the metrics in a manifest: for facts about the use of an artifact, not about its content."""
        manifest = {**artifact.manifest, "metrics": masked(dict(metrics), but=VERBATIM)}
        _write_manifest(artifact.path, manifest)
        return Artifact(artifact.path, manifest)

    def remove(self, artifact: Artifact) -> None:
        """Remove an artifact, in one rename; the caller holds the asset's lock.

        A kill leaves a temporary folder, never an artifact with half its files.
        """
        folder = artifact.path.parent
        if _pointed_to(folder / CURRENT) == artifact.fingerprint:
            (folder / CURRENT).unlink()
        trash = folder / f"{STAGING}removed-{artifact.fingerprint}"
        artifact.path.rename(trash)
        fsync(folder)
        shutil.rmtree(trash)

    def _next_date(self, recipe: str, asset: str) -> str:
        now = datetime.now(UTC)
        if artifacts := self.published(recipe, asset):
            last = _moment(artifacts[-1].created)
            assert last is not None
            now = max(now, last + timedelta(milliseconds=1))
        return now.isoformat(timespec="milliseconds")


def _pointed_to(pointer: Path) -> str | None:
    """Return the fingerprint that a pointer names; None if the pointer is absent or foreign."""
    try:
        with open_regular(pointer) as file:
            text = file.read(LONGEST_POINTER).decode().strip()
    except (OSError, ValueError):
        return None
    return text if re.fullmatch(r"[0-9a-f]+", text) else None


def _moment(created: object) -> datetime | None:
    """Parse a manifest's date, as UTC."""
    try:
        return datetime.fromisoformat(str(created)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    write_atomically(folder / MANIFEST, _text_of(manifest).encode())


def _text_of(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
