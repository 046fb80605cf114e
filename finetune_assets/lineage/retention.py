"""What may go: artifacts that nothing needs any more and that a run can make again, and what killed builders left.

An artifact stays that is current, wanted by today's recipe, among the newest of its asset, or served; that a build in
progress may be reading; or that is an input of one that stays. The locks of a recipe's assets are held while it is
judged and cleared, so that nothing is built from what is going.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from finetune_assets.export.ollama import model_store as ollama_store
from finetune_assets.export.ollama.publish import digests_of, served_digests, unused_blobs
from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.plan import make_plan
from finetune_assets.machine.disk import disk_trouble
from finetune_assets.recipe import name_problem
from finetune_assets.recipe.file import find_recipe, load_recipe, recipe_name, recipe_path
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import BadInput, FinetuneError
from finetune_assets.store.artifact import Artifact
from finetune_assets.store.artifact_store import CURRENT, STAGING, ArtifactStore

Key = tuple[str, str]  # asset, fingerprint
ORPHAN_AGE = 3600.0  # seconds: a pointer is written in milliseconds, and not always under a lock


@dataclass(frozen=True)
class Subject:
    """A recipe whose artifacts are looked at. `file`: None where there is no such recipe any more."""

    name: str
    file: Path | None
    named: bool


@dataclass(frozen=True)
class Removed:
    """Something that went, or would go."""

    kind: Literal["artifact", "staging", "temporary", "blob"]
    path: Path
    bytes: int
    recipe: str | None = None
    artifact: Artifact | None = None


@dataclass(frozen=True)
class Kept:
    artifact: Artifact
    reasons: tuple[str, ...]


@dataclass
class Collection:
    """What a collection did, or would do. `left_alone`: what it did not touch, and why."""

    removed: list[Removed] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    left_alone: list[tuple[Path, str]] = field(default_factory=list)
    links: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)

    def weigh(self, path: Path) -> int:
        """The bytes of a file or folder that is about to go."""
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
        """Bytes that the disk gets back: a file with several names counts once, when the last of them has gone."""
        return sum(size for left, size in self.links.values() if left <= 0)


def subjects(specs: Sequence[str], project: Project, store: ArtifactStore) -> list[Subject]:
    """The recipes named, or every recipe that has a folder in the store.

    Raises:
        BadInput: a name is neither that of a recipe nor that of a folder in the store.
    """
    if not specs:
        folders = sorted(path.name for path in store.root.iterdir() if path.is_dir()) if store.root.is_dir() else []
        files = {name: recipe_path(name, project.configs) for name in folders}
        return [Subject(name, file if file.is_file() else None, named=False) for name, file in files.items()]
    found = []
    for spec in specs:
        try:
            file = find_recipe(spec, project.configs)
            found.append(Subject(recipe_name(file), file, named=True))
        except BadInput:
            if not (name_problem(spec) is None and (store.root / spec).is_dir()):
                raise
            found.append(Subject(spec, None, named=True))
    return found


def collect(
    recipes: Sequence[Subject], project: Project, store: ArtifactStore, *, keep: int, dry_run: bool
) -> Collection:
    """Remove what may go.

    Args:
        keep: how many of the newest artifacts of each asset stay in any case.
        dry_run: say it, and remove nothing.

    Raises:
        StepFailed: the store cannot be written.
    """
    done = Collection()
    try:
        for subject in recipes:
            _collect_recipe(subject, project, store, keep, dry_run, done)
        _collect_blobs(project.ollama_models, dry_run, done)
    except OSError as error:
        if (failure := disk_trouble(error, store.root, outcome="what is left is whole")) is None:
            raise
        raise failure from error
    return done


def reasons_to_stay(
    artifacts: Sequence[Artifact], roots: Mapping[Key, Sequence[str]], keep: int
) -> dict[Key, list[str]]:
    """Which artifacts of one recipe stay, and why; the others may go.

    Args:
        roots: what stays whatever else there is, with the reasons.
        keep: how many of the newest of each asset stay.
    """
    known = {_key(artifact): artifact for artifact in artifacts}
    reasons = {key: list(words) for key, words in roots.items()}
    for asset in {artifact.manifest["asset"] for artifact in artifacts}:
        own = sorted((item for item in artifacts if item.manifest["asset"] == asset), key=lambda item: item.created)
        for artifact in own[max(len(own) - keep, 0) :]:
            reasons.setdefault(_key(artifact), []).append("newest" if keep == 1 else f"among the newest {keep}")
    waiting = list(reasons)
    while waiting:
        asset, fingerprint = waiting.pop()
        if (artifact := known.get((asset, fingerprint))) is None:
            continue
        for key in artifact.inputs.items():
            if key not in reasons:
                waiting.append(key)
            reasons.setdefault(key, []).append(f"input of {asset} {fingerprint[:8]}")
    return reasons


def _collect_recipe(
    subject: Subject, project: Project, store: ArtifactStore, keep: int, dry_run: bool, done: Collection
) -> None:
    folder = store.root / subject.name
    assets = [name for name in NODES if (folder / name).is_dir()]
    if folder.is_dir():
        done.left_alone += [(path, "no asset's folder") for path in sorted(folder.iterdir()) if path.name not in assets]
    with ExitStack() as held:
        busy = {name for name in assets if not _take(held, store, subject.name, name)}
        roots: dict[Key, list[str]] = {}
        for name in assets:
            if name not in busy:
                _sweep(folder / name, subject.name, dry_run, done)
            _foreign_entries(folder / name, name, subject.name, store, roots, done)
        artifacts = [artifact for name in assets for artifact in store.published(subject.name, name)]
        try:
            wanted = _wanted(subject, project, store)
        except FinetuneError as error:
            if not subject.named:
                why = f"{error.message.splitlines()[0]}: kept, unless named: finetune gc {subject.name}"
                done.left_alone += [(folder, why)] if artifacts else []
                return
            wanted = set()
        for key, why in _roots(subject, artifacts, wanted, busy, project, store):
            roots.setdefault(key, []).append(why)
        reasons = reasons_to_stay(artifacts, roots, keep)
        for artifact in artifacts:
            if stays := reasons.get(_key(artifact)):
                done.kept.append(Kept(artifact, tuple(dict.fromkeys(stays))))
        for artifact in reversed(artifacts):  # downstream first: whatever is left at any moment has its inputs
            if _key(artifact) not in reasons:
                done.removed.append(
                    Removed("artifact", artifact.path, done.weigh(artifact.path), subject.name, artifact)
                )
                if not dry_run:
                    store.remove(artifact)


def _take(held: ExitStack, store: ArtifactStore, recipe: str, asset: str) -> bool:
    from filelock import Timeout

    try:
        held.enter_context(store.lock(recipe, asset).acquire(timeout=0))
    except Timeout:
        return False
    return True


def _wanted(subject: Subject, project: Project, store: ArtifactStore) -> set[Key]:
    """What today's recipe asks for, whole or not, as far as that can be known.

    Raises:
        FinetuneError: the recipe is gone, or it or its sources cannot be read.
    """
    if subject.file is None:
        raise BadInput(f"there is no recipe {subject.name} any more")
    plan = make_plan(load_recipe(subject.file), project, store)
    return {(name, item.wanted) for name, item in plan.items() if item.wanted is not None}


def _roots(
    subject: Subject,
    artifacts: Sequence[Artifact],
    wanted: set[Key],
    busy: set[str],
    project: Project,
    store: ArtifactStore,
) -> list[tuple[Key, str]]:
    current = {name: store.current(subject.name, name) for name in NODES} if subject.file is not None else {}
    read = {up.asset: name for name in busy for up in NODES[name].upstreams}
    serving = _Serving(project.ollama_models)
    roots: list[tuple[Key, str]] = []
    for artifact in artifacts:
        key = asset, fingerprint = _key(artifact)
        last = current.get(asset)
        if last is not None and last.fingerprint == fingerprint:
            roots.append((key, "current"))
        if key in wanted:
            roots.append((key, "wanted by the recipe"))
        if asset == "ollama_model" and (why := serving.reason(artifact)):
            roots.append((key, why))
        if asset in busy:
            roots.append((key, "its asset is being built now"))
        if asset in read:
            roots.append((key, f"{read[asset]} is being built now"))
        if artifact.path.is_symlink():
            roots.append((key, "a symbolic link"))
    return roots


class _Serving:
    """Asks once for each name what is served under it."""

    def __init__(self, models: Path):
        self.models = models
        self.known: dict[str, set[str] | None] = {}

    def reason(self, artifact: Artifact) -> str | None:
        """Why an ollama_model must stay, if it must."""
        for name, digest in digests_of(artifact.metrics).items():
            if name not in self.known:
                try:
                    self.known[name] = served_digests(name, self.models)
                except (FinetuneError, OSError):
                    self.known[name] = None
            served = self.known[name]
            if served is None:
                return "the Ollama server cannot be asked"
            if digest in served:
                return f"served as {name.removesuffix(':latest')}"
        return None


def _sweep(folder: Path, recipe: str, dry_run: bool, done: Collection) -> None:
    """What killed builders left. The lock, held, proves that nobody is at work in staging folders."""
    for path in sorted(folder.glob(f"{STAGING}*")):
        done.removed.append(Removed("staging", path, done.weigh(path), recipe))
        if not dry_run:
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
    for path in sorted(folder.glob(f".{CURRENT}-*")):
        if time.time() - path.stat().st_mtime > ORPHAN_AGE:
            done.removed.append(Removed("temporary", path, done.weigh(path), recipe))
            if not dry_run:
                path.unlink()


def _foreign_entries(
    folder: Path, asset: str, recipe: str, store: ArtifactStore, roots: dict[Key, list[str]], done: Collection
) -> None:
    """What is not ours stays, and so do the inputs that it names."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == CURRENT:
            continue
        if (foreign := store.foreign_entry(recipe, asset, path.name)) is not None:
            done.left_alone.append((path, foreign.why))
            for key in foreign.inputs.items():
                roots.setdefault(key, []).append(f"input of {asset} {path.name[:8]}")
    if (lost := store.lost_current(recipe, asset)) is not None:
        done.left_alone.append((folder / CURRENT, lost))


def _collect_blobs(models: Path, dry_run: bool, done: Collection) -> None:
    """Files of our own Ollama store that belong to no model there. A server's store is the server's business."""
    from filelock import Timeout

    if not (models / "blobs").is_dir():
        return
    try:
        with ollama_store.lock(models).acquire(timeout=0):
            for path in unused_blobs(models):
                done.removed.append(Removed("blob", path, done.weigh(path)))
                if not dry_run:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
    except Timeout:
        done.left_alone.append((models, "a model is being written"))
    except FinetuneError as error:
        done.left_alone.append((models, error.message))


def _key(artifact: Artifact) -> Key:
    return artifact.manifest["asset"], artifact.fingerprint
