"""Garbage collection: remove artifacts that nothing needs and that a run can make again, and leftovers of kills.

An artifact stays if it is current, wanted by today's recipe, among the newest of its asset, or served; if a build in
progress may be reading it; or if it is an input of one that stays. The locks of a recipe's assets are held from the
decision to the removal, so that no build uses what is being removed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.nodes.ollama_model import unused_files
from finetune_assets.lineage.plan import make_plan
from finetune_assets.machine.disk import disk_trouble
from finetune_assets.recipe import name_problem
from finetune_assets.recipe.file import find_recipe, load_recipe, recipe_name, recipe_path
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import BadInput, FinetuneError
from finetune_assets.store.artifact import Artifact
from finetune_assets.store.artifact_store import CURRENT, STAGING, ArtifactStore

Key = tuple[str, str]  # asset, fingerprint
Kind = Literal["artifact", "staging", "temporary", "blob"]
ORPHAN_AGE = 3600.0  # seconds: a pointer is written in milliseconds, and not always under a lock


@dataclass(frozen=True)
class Subject:
    """A recipe whose artifacts are judged. `file`: None if the recipe no longer exists."""

    name: str
    file: Path | None
    named: bool


@dataclass(frozen=True)
class Removed:
    """A file or folder that was removed, or would be."""

    kind: Kind
    path: Path
    bytes: int
    recipe: str | None = None
    artifact: Artifact | None = None


@dataclass(frozen=True)
class Kept:
    """An artifact that stays, and why."""

    artifact: Artifact
    reasons: tuple[str, ...]


@dataclass
class Collection:
    """The result of a collection, or of a dry run. `left_alone`: what it did not touch, and why."""

    removed: list[Removed] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    left_alone: list[tuple[Path, str]] = field(default_factory=list)
    links: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)

    def remove(self, kind: Kind, path: Path, recipe: str | None = None, artifact: Artifact | None = None) -> Removed:
        """Add a file or folder to what is removed."""
        item = Removed(kind, path, self._weigh(path), recipe, artifact)
        self.removed.append(item)
        return item

    def _weigh(self, path: Path) -> int:
        """Return the bytes of a file or folder, and count its names for `freed`."""
        total = 0
        for file in [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]:
            stat = file.lstat()
            if file.is_symlink() or not file.is_dir():
                total += stat.st_size
                left, _ = self.links.get((stat.st_dev, stat.st_ino), (stat.st_nlink, 0))
                self.links[stat.st_dev, stat.st_ino] = (left - 1, stat.st_size)
        return total

    @property
    def freed(self) -> int:
        """Bytes that the disk gets back: a file with several names counts once, if all of them are removed."""
        return sum(size for left, size in self.links.values() if left <= 0)


def subjects(specs: Sequence[str], project: Project, store: ArtifactStore) -> list[Subject]:
    """Return the recipes named, or every recipe that has a folder in the store.

    Raises:
        BadInput: a name is neither that of a recipe nor that of a folder in the store.
    """
    if not specs:
        folders = sorted(path.name for path in store.root.iterdir() if path.is_dir()) if store.root.is_dir() else []
        files = {name: recipe_path(name, project.configs) for name in folders}
        return [Subject(name, file if file.is_file() else None, named=False) for name, file in files.items()]
    named = []
    for spec in specs:
        try:
            file = find_recipe(spec, project.configs)
            named.append(Subject(recipe_name(file), file, named=True))
        except BadInput:
            if not (name_problem(spec) is None and (store.root / spec).is_dir()):
                raise
            named.append(Subject(spec, None, named=True))
    return named


def collect(
    recipes: Sequence[Subject], project: Project, store: ArtifactStore, *, keep: int, dry_run: bool
) -> Collection:
    """Remove what nothing needs: decide for each recipe, then carry out the decision under the same locks.

    Args:
        keep: how many of the newest artifacts of each asset stay in any case.
        dry_run: decide, and remove nothing.

    Raises:
        StepFailed: the store cannot be written.
    """
    done = Collection()
    try:
        for subject in recipes:
            with ExitStack() as locks:
                _carry_out(_Judge(subject, project, store, done).decide(locks, keep), store, dry_run)
        try:
            with unused_files(project.ollama_models) as files:
                _carry_out([done.remove("blob", path) for path in files], store, dry_run)
        except FinetuneError as error:
            done.left_alone.append((project.ollama_models, error.message))
    except OSError as error:
        if (failure := disk_trouble(error, store.root, outcome="what is left is intact")) is None:
            raise
        raise failure from error
    return done


def _carry_out(removed: Sequence[Removed], store: ArtifactStore, dry_run: bool) -> None:
    for item in removed if not dry_run else ():
        if item.artifact is not None:
            store.remove(item.artifact)
        elif item.kind == "temporary" or item.path.is_symlink() or not item.path.is_dir():
            item.path.unlink()
        else:
            shutil.rmtree(item.path)


def reasons_to_stay(
    artifacts: Sequence[Artifact], roots: Mapping[Key, Sequence[str]], keep: int
) -> dict[Key, list[str]]:
    """Return which artifacts of one recipe stay, and why; the others may be removed.

    Args:
        roots: artifacts that stay in any case, with the reasons.
        keep: how many of the newest of each asset stay.
    """
    artifact_of = {_key(artifact): artifact for artifact in artifacts}
    reasons = {key: list(words) for key, words in roots.items()}
    for asset in {artifact.manifest["asset"] for artifact in artifacts}:
        own = sorted((item for item in artifacts if item.manifest["asset"] == asset), key=lambda item: item.created)
        for artifact in own[max(len(own) - keep, 0) :]:
            reasons.setdefault(_key(artifact), []).append("newest" if keep == 1 else f"among the newest {keep}")
    waiting = list(reasons)
    while waiting:
        asset, fingerprint = waiting.pop()
        if (artifact := artifact_of.get((asset, fingerprint))) is None:
            continue
        for key in artifact.inputs.items():
            if key not in reasons:
                waiting.append(key)
            reasons.setdefault(key, []).append(f"input of {asset} {fingerprint[:8]}")
    return reasons


class _Judge:
    """The decision for one recipe: adds to `done` what is removed, what stays and what is left alone."""

    def __init__(self, subject: Subject, project: Project, store: ArtifactStore, done: Collection):
        self._subject, self._project, self._store, self._done = subject, project, store, done
        self._folder = store.root / subject.name
        self._assets = [name for name in NODES if (self._folder / name).is_dir()]
        self._busy: set[str] = set()
        self._roots: dict[Key, list[str]] = {}

    def decide(self, locks: ExitStack, keep: int) -> list[Removed]:
        """Take the locks of the recipe's assets, and return what to remove, in this order."""
        self._busy = {name for name in self._assets if not _take(locks, self._store, self._subject.name, name)}
        self._leave_foreign_entries()
        removed = [item for name in self._assets if name not in self._busy for item in self._leftovers(name)]
        artifacts = [artifact for name in self._assets for artifact in self._store.published(self._subject.name, name)]
        try:
            wanted = _wanted(self._subject, self._project, self._store)
        except FinetuneError as error:
            if not self._subject.named:
                why = f"{error.message.splitlines()[0]}; to collect it, name it: finetune gc {self._subject.name}"
                self._done.left_alone += [(self._folder, why)] if artifacts else []
                return removed
            wanted = set()
        for artifact in artifacts:
            if reasons := list(self._reasons(artifact, wanted)):
                self._roots.setdefault(_key(artifact), []).extend(reasons)
        return removed + self._divide(artifacts, keep)

    def _divide(self, artifacts: Sequence[Artifact], keep: int) -> list[Removed]:
        reasons = reasons_to_stay(artifacts, self._roots, keep)
        for artifact in artifacts:
            if stays := reasons.get(_key(artifact)):
                self._done.kept.append(Kept(artifact, tuple(dict.fromkeys(stays))))
        return [
            self._done.remove("artifact", artifact.path, self._subject.name, artifact)
            for artifact in reversed(artifacts)  # downstream first: a kill leaves every artifact with its inputs
            if _key(artifact) not in reasons
        ]

    def _leftovers(self, asset: str) -> Iterator[Removed]:
        """Find what killed builders left. The held lock proves that no builder uses the staging folders."""
        for path in sorted((self._folder / asset).glob(f"{STAGING}*")):
            yield self._done.remove("staging", path, self._subject.name)
        for path in sorted((self._folder / asset).glob(f".{CURRENT}-*")):
            if time.time() - path.stat().st_mtime > ORPHAN_AGE:
                yield self._done.remove("temporary", path, self._subject.name)

    def _leave_foreign_entries(self) -> None:
        """Keep foreign entries, and the inputs that they name."""
        left_alone, recipe = self._done.left_alone, self._subject.name
        if self._folder.is_dir():
            paths = sorted(self._folder.iterdir())
            left_alone += [(path, "not an asset's folder") for path in paths if path.name not in self._assets]
        for asset in self._assets:
            folder = self._folder / asset
            for path in sorted(folder.iterdir()):
                if path.name.startswith(".") or path.name == CURRENT:
                    continue
                if (entry := self._store.foreign_entry(recipe, asset, path.name)) is not None:
                    left_alone.append((path, entry.why))
                    for key in entry.inputs.items():
                        self._roots.setdefault(key, []).append(f"input of {asset} {path.name[:8]}")
            if (lost := self._store.lost_current(recipe, asset)) is not None:
                left_alone.append((folder / CURRENT, lost))

    @cached_property
    def _current(self) -> dict[str, Artifact | None]:
        names = NODES if self._subject.file is not None else ()
        return {name: self._store.current(self._subject.name, name) for name in names}

    @cached_property
    def _in_use(self) -> dict[str, Callable[[Artifact], str | None]]:
        return {name: node.in_use(self._project) for name, node in NODES.items()}

    @cached_property
    def _read(self) -> dict[str, str]:
        """Assets that a build in progress may be reading -> the asset being built."""
        return {up.asset: name for name in self._assets if name in self._busy for up in NODES[name].upstreams}

    def _reasons(self, artifact: Artifact, wanted: set[Key]) -> Iterator[str]:
        """Give the reasons why an artifact stays, regardless of other artifacts."""
        asset, fingerprint = _key(artifact)
        last = self._current.get(asset)
        if last is not None and last.fingerprint == fingerprint:
            yield "current"
        if (asset, fingerprint) in wanted:
            yield "wanted by the recipe"
        if why := self._in_use[asset](artifact):
            yield why
        if asset in self._busy:
            yield "its asset is being built now"
        if asset in self._read:
            yield f"{self._read[asset]} is being built now"
        if artifact.path.is_symlink():
            yield "a symbolic link"


def _take(held: ExitStack, store: ArtifactStore, recipe: str, asset: str) -> bool:
    from filelock import Timeout

    try:
        held.enter_context(store.lock(recipe, asset).acquire(timeout=0))
    except Timeout:
        return False
    return True


def _wanted(subject: Subject, project: Project, store: ArtifactStore) -> set[Key]:
    """Return what today's recipe asks for, as far as that can be known.

    Raises:
        FinetuneError: the recipe no longer exists, or it or its sources cannot be read.
    """
    if subject.file is None:
        raise BadInput(f"the recipe {subject.name} no longer exists")
    plan = make_plan(load_recipe(subject.file), project, store)
    return {(name, item.wanted) for name, item in plan.items() if item.wanted is not None}


def _key(artifact: Artifact) -> Key:
    return artifact.manifest["asset"], artifact.fingerprint
