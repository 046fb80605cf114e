"""Plans, artifacts and results as tables for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from finetune_assets.artifacts import Artifact, ArtifactStore
from finetune_assets.lineage import NODES
from finetune_assets.plan import Planned
from finetune_assets.recipe import Recipe

if TYPE_CHECKING:
    from finetune_assets.doctor import Check

STATE_STYLES = {"fresh": "green", "stale": "yellow", "missing": "red", "maybe": "cyan"}
CHECK_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def plan_json(plan: Mapping[str, Planned]) -> list[dict[str, Any]]:
    """`finetune plan --json`: asset, state and reasons of each asset, upstreams first."""
    return [{"asset": item.asset, "state": item.state, "reasons": list(item.reasons)} for item in plan.values()]


def plan_tree(recipe: str, plan: Mapping[str, Planned]) -> Tree:
    """The plan as a tree along the lineage: an asset hangs below the last of its upstreams."""
    tree = Tree(Text(recipe, style="bold"))
    branches: dict[str, Tree] = {}
    for item in plan.values():
        upstreams = NODES[item.asset].upstreams
        parent = branches[upstreams[-1].asset] if upstreams else tree
        branches[item.asset] = parent.add(planned_line(item))
    return tree


def planned_line(item: Planned) -> Text:
    """An asset, its state, and the reasons."""
    line = Text(item.asset)
    line.append(f"  {item.state}", style=STATE_STYLES[item.state])
    if item.reasons:
        line.append("  " + "; ".join(item.reasons), style="dim")
    return line


def known_artifacts(recipe: Recipe, plan: Mapping[str, Planned], store: ArtifactStore) -> dict[str, Artifact]:
    """Each asset's artifact: the wanted one if it is there, else the one made last."""
    found = {name: item.artifact or store.current(recipe.name, name) for name, item in plan.items()}
    return {name: artifact for name, artifact in found.items() if artifact is not None}


def artifacts_json(artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """`finetune artifacts --json`: asset -> path, fingerprint, data_version, files."""
    return {
        name: {
            "path": str(artifact.path),
            "fingerprint": artifact.fingerprint,
            "data_version": artifact.data_version,
            "files": {file: dict(record) for file, record in artifact.manifest["files"].items()},
        }
        for name, artifact in artifacts.items()
    }


def artifacts_table(artifacts: Mapping[str, Artifact]) -> Table:
    """What was made, how large, and where."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("asset", "size", "where"):
        table.add_column(column, overflow="fold", justify="right" if column == "size" else "left")
    for name, artifact in artifacts.items():
        table.add_row(name, human_size(artifact.size), short_path(artifact.path))
    return table


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """Base against tuned, on the test rows."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (f"on {metrics['rows']} test rows", "base", "tuned"):
        table.add_column(column, justify="right" if column in ("base", "tuned") else "left")
    for name in ("bleu-4", "rouge-1", "rouge-2", "rouge-l", "perplexity"):
        cells = ["-" if metrics[side][name] is None else f"{metrics[side][name]:.2f}" for side in ("base", "tuned")]
        table.add_row(name, *cells)
    return table


def checks_table(checks: list[Check]) -> Table:
    """`finetune doctor`: what was found, and what to do where something is wrong."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("check", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(check.name, Text(check.state, style=CHECK_STYLES[check.state]), check.found, check.advice or "")
    return table


def short_path(path: Path) -> str:
    """The path as one would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def moment(created: str) -> str:
    """A manifest's time as people write it: `2026-11-22 15:45 UTC`."""
    return f"{created[:10]} {created[11:16]} UTC"


def human_size(size: float) -> str:
    """Bytes in decimal units: `538.1 MB`."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
