"""The ancestry of a published artifact, back to the first rows, read from the manifests alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_assets.lineage.graph import NODES
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.store.artifact import Artifact
from finetune_assets.store.artifact_store import ArtifactStore


@dataclass(frozen=True)
class Ancestor:
    """An artifact, or the name of one that was removed."""

    asset: str
    fingerprint: str
    artifact: Artifact | None

    def described(self) -> dict[str, Any]:
        """Return all that is recorded, under the same keys for every asset; None for a fact that is not recorded.

        `recipe` has the values that differed from the defaults. `rows` has digests of the rows that the artifact holds,
        or that its step read.
        """
        manifest: Mapping[str, Any] = self.artifact.manifest if self.artifact else {}
        ingredients: Mapping[str, Any] = manifest.get("ingredients", {})
        metrics: Mapping[str, Any] = manifest.get("metrics", {})
        return {
            "asset": self.asset,
            "fingerprint": self.fingerprint,
            "present": self.artifact is not None,
            "path": str(self.artifact.path) if self.artifact else None,
            "data_version": manifest.get("data_version"),
            "created": manifest.get("created"),
            "seconds": manifest.get("seconds"),
            "code_version": ingredients.get("code_version"),
            "recipe": ingredients.get("recipe"),
            "sources": ingredients.get("sources"),
            "tools": ingredients.get("tools"),
            "libraries": manifest.get("libraries"),
            "seed": manifest.get("seed"),
            "device": metrics.get("device"),
            "precision": metrics.get("precision"),
            "metrics": _headline(self.asset, metrics),
            "rows": self._rows(manifest, ingredients),
            "inputs": manifest.get("inputs"),
        }

    def _rows(self, manifest: Mapping[str, Any], ingredients: Mapping[str, Any]) -> dict[str, str]:
        if self.asset == "dataset_info":
            return dict(manifest.get("parts", {}))
        read = ingredients.get("upstreams", {})
        return {key.partition("/")[2]: version for key, version in read.items() if key.startswith("dataset_info/")}


def ancestry(recipe: str, asset: str, store: ArtifactStore) -> list[Ancestor]:
    """Return the current artifact of an asset and all its ancestors, each after the artifacts made from it.

    An asset can occur twice: an adapter may have been trained on an earlier snapshot of the same rows.

    Raises:
        StepFailed: the asset has not been made.
    """
    current = store.current(recipe, asset)
    if current is None:
        raise StepFailed(f"{recipe}/{asset} has not been made yet", f"finetune run {recipe} --to {asset}")
    ancestors = {(asset, current.fingerprint): Ancestor(asset, current.fingerprint, current)}
    waiting = [current]
    while waiting:
        for key in waiting.pop().inputs.items():
            if key not in ancestors:
                artifact = store.get(recipe, *key)
                ancestors[key] = Ancestor(*key, artifact)
                waiting += [artifact] if artifact is not None else []
    order = {name: number for number, name in enumerate(NODES)}
    return sorted(ancestors.values(), key=lambda item: order.get(item.asset, -1), reverse=True)


def _headline(asset: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return dict(NODES[asset].headline(metrics)) if asset in NODES else {}
