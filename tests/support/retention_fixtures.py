"""Collections in a test project, and what to ask of them."""

from __future__ import annotations

from pathlib import Path

from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.retention import Collection, collect, subjects
from finetune_assets.store.artifact import Artifact
from tests.conftest import MiniProject
from tests.support.history_fixtures import make_chain, store_of

Keys = set[tuple[str, str]]


def three_rates(mini: MiniProject) -> list[dict[str, Artifact]]:
    """Three learning rates, each with its own chain from the adapter on."""
    made = []
    for rate in (1e-3, 2e-3, 3e-3):
        mini.edit(train={"learning_rate": rate})
        made.append(make_chain(mini))
    return made


def gc(mini: MiniProject, *names: str, keep: int = 0, dry_run: bool = False) -> Collection:
    store = store_of(mini)
    return collect(subjects(names, mini, store), mini, store, keep=keep, dry_run=dry_run)


def there(mini: MiniProject, name: str = "mini") -> Keys:
    return {(asset, item.fingerprint) for asset in NODES for item in store_of(mini).published(name, asset)}


def keys(artifacts: dict[str, Artifact]) -> Keys:
    return {(name, artifact.fingerprint) for name, artifact in artifacts.items()}


def gone(done: Collection) -> Keys:
    return {(item.path.parent.name, item.path.name) for item in done.removed if item.kind == "artifact"}


def reasons(done: Collection) -> dict[str, tuple[str, ...]]:
    return {item.artifact.fingerprint: item.reasons for item in done.kept}


def disk(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
