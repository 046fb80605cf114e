"""The state of one asset in a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune_assets.store.artifact import Artifact

State = Literal["fresh", "stale", "missing", "maybe"]


@dataclass(frozen=True)
class Planned:
    """One asset's state: `maybe` means that an upstream will run and may come out as it was.

    `artifact` is what is published for the wanted fingerprint, whole and in place: set exactly when fresh. `wanted` is
    that fingerprint, known as soon as every upstream is fresh.
    """

    asset: str
    state: State
    reasons: tuple[str, ...]
    artifact: Artifact | None = None
    wanted: str | None = None
