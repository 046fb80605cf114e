"""The state of one asset in a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune_assets.store.artifact import Artifact

State = Literal["fresh", "stale", "missing", "maybe"]


@dataclass(frozen=True)
class Planned:
    """The state of one asset: `maybe` means that an upstream will run, and may come out unchanged.

    Args:
        artifact: the valid artifact with the wanted fingerprint; set exactly when fresh.
        wanted: the fingerprint that the recipe asks for; known if every upstream is fresh.
    """

    asset: str
    state: State
    reasons: tuple[str, ...]
    artifact: Artifact | None = None
    wanted: str | None = None
