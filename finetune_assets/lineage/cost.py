"""The cost of making an asset, and the facts from which a node estimates it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from finetune_assets.lineage.planned import Planned
from finetune_assets.recipe import Recipe
from finetune_assets.recipe.project import Project
from finetune_assets.store.artifact import Artifact
from finetune_assets.store.artifact_store import ArtifactStore

T = TypeVar("T")


@dataclass(frozen=True)
class Download:
    """Bytes that have yet to be fetched, and the folder that they are fetched into."""

    bytes: int
    cache: Path


@dataclass(frozen=True)
class Cost:
    """The cost of making an asset; None: unknown.

    Args:
        scratch: bytes of temporary files.
        download: files to fetch from a hub, if the hub was asked.
    """

    seconds: float | None
    bytes: int | None
    scratch: int = 0
    download: Download | None = None


UNKNOWN = Cost(None, None)


class Known:
    """All that is known before a run.

    Args:
        ask_hub: whether a hub may be asked for the size of a base model.
    """

    def __init__(
        self,
        recipe: Recipe,
        project: Project,
        plan: Mapping[str, Planned],
        store: ArtifactStore,
        *,
        ask_hub: bool = False,
    ):
        self.recipe = recipe
        self.project = project
        self.plan = plan
        self.store = store
        self.ask_hub = ask_hub
        self._past: dict[str, Artifact | None] = {}
        self._facts: dict[Callable[[Known], Any], Any] = {}

    def past(self, asset: str) -> Artifact | None:
        """Return the asset's current artifact, else its newest, else the newest of any recipe."""
        if asset not in self._past:
            self._past[asset] = self._find_past(asset)
        return self._past[asset]

    def _find_past(self, asset: str) -> Artifact | None:
        if (own := self.store.current(self.recipe.name, asset)) is not None:
            return own
        if published := self.store.published(self.recipe.name, asset):
            return published[-1]
        recipes = [path.name for path in self.store.root.iterdir() if path.is_dir()] if self.store.root.is_dir() else []
        artifacts = [artifact for recipe in recipes for artifact in self.store.published(recipe, asset)]
        return max(artifacts, key=lambda artifact: artifact.created, default=None)

    def of(self, fact: Callable[[Known], T]) -> T:
        """Return a fact that several nodes use, computed once."""
        if fact not in self._facts:
            self._facts[fact] = fact(self)
        return cast(T, self._facts[fact])


def seconds_of(past: Artifact | None, code_version: str) -> float | None:
    """Return how long a past run took, if the step had today's code version."""
    if past is None or past.manifest["ingredients"].get("code_version") != code_version:
        return None
    return past.manifest.get("seconds")


def times(value: float | None, factor: float | None) -> float | None:
    """Multiply; None if either is unknown."""
    return None if value is None or factor is None else value * factor


def at_most(count: int, limit: int | None) -> int:
    """Return a count, or its limit if there is one and it is smaller."""
    return min(count, limit) if limit else count


def ratio(now: float, before: float) -> float:
    """Return now / before; 1 if either is not recorded."""
    return now / before if now and before else 1.0
