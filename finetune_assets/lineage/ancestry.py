"""What a published artifact was made of, back to the first rows: read from the manifests, and from nothing else."""

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
    """An artifact, or the name of one that is gone."""

    asset: str
    fingerprint: str
    artifact: Artifact | None

    def described(self) -> dict[str, Any]:
        """All there is to say, under the same keys for every asset; None where it is not on record.

        `recipe` has the values that were not the defaults. `rows` are digests of rows: of those that it holds, or of
        those that it read.
        """
        manifest: Mapping[str, Any] = self.artifact.manifest if self.artifact else {}
        made: Mapping[str, Any] = manifest.get("ingredients", {})
        metrics: Mapping[str, Any] = manifest.get("metrics", {})
        return {
            "asset": self.asset,
            "fingerprint": self.fingerprint,
            "present": self.artifact is not None,
            "path": str(self.artifact.path) if self.artifact else None,
            "data_version": manifest.get("data_version"),
            "created": manifest.get("created"),
            "seconds": manifest.get("seconds"),
            "code_version": made.get("code_version"),
            "recipe": made.get("recipe"),
            "sources": made.get("sources"),
            "tools": made.get("tools"),
            "libraries": manifest.get("libraries"),
            "seed": manifest.get("seed"),
            "device": metrics.get("device"),
            "precision": metrics.get("precision"),
            "metrics": _headline(self.asset, metrics),
            "rows": self._rows(manifest, made),
            "inputs": manifest.get("inputs"),
        }

    def _rows(self, manifest: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, str]:
        if self.asset == "dataset_info":
            return dict(manifest.get("parts", {}))
        read = made.get("upstreams", {})
        return {key.partition("/")[2]: version for key, version in read.items() if key.startswith("dataset_info/")}


def ancestry(recipe: str, asset: str, store: ArtifactStore) -> list[Ancestor]:
    """The current artifact of an asset and everything that it was made of, each after whatever was made of it.

    An asset can be there twice: an adapter may have been trained on an earlier snapshot of the same rows.

    Raises:
        StepFailed: the asset has not been made.
    """
    current = store.current(recipe, asset)
    if current is None:
        raise StepFailed(f"{recipe}/{asset} has not been made yet", f"finetune run {recipe} --to {asset}")
    found = {(asset, current.fingerprint): Ancestor(asset, current.fingerprint, current)}
    waiting = [current]
    while waiting:
        for key in waiting.pop().inputs.items():
            if key not in found:
                artifact = store.get(recipe, *key)
                found[key] = Ancestor(*key, artifact)
                waiting += [artifact] if artifact is not None else []
    order = {name: number for number, name in enumerate(NODES)}
    return sorted(found.values(), key=lambda item: order.get(item.asset, -1), reverse=True)


def _headline(asset: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return dict(NODES[asset].headline(metrics)) if asset in NODES else {}
