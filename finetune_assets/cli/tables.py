"""Plans, artifacts and results as tables for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from finetune_assets.evaluation.metrics import HEADLINES
from finetune_assets.evaluation.scored_row import SIDES
from finetune_assets.export.serving_commands import commands
from finetune_assets.lineage.cost import Cost
from finetune_assets.lineage.estimate import Total
from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.planned import Planned
from finetune_assets.recipe import Recipe
from finetune_assets.reporting.printable import human_size
from finetune_assets.store.artifact import Artifact
from finetune_assets.store.artifact_store import ArtifactStore

if TYPE_CHECKING:
    from finetune_assets.cli.doctor import Check

STATE_STYLES = {"fresh": "green", "stale": "yellow", "missing": "red", "maybe": "cyan"}
UNTIMED = "no earlier run to estimate from"
CHECK_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def plan_json(plan: Mapping[str, Planned], costs: Mapping[str, Cost]) -> list[dict[str, Any]]:
    """Return `finetune plan --json`: each asset's state, reasons, seconds, bytes (null: unknown), upstreams first."""
    nothing = Cost(0, 0)
    rows = [(item, costs.get(item.asset, nothing)) for item in plan.values()]
    return [
        {
            "asset": item.asset,
            "state": item.state,
            "reasons": list(item.reasons),
            "seconds": None if cost.seconds is None else round(cost.seconds, 1),
            "bytes": cost.bytes,
        }
        for item, cost in rows
    ]


def plan_tree(recipe: str, plan: Mapping[str, Planned], costs: Mapping[str, Cost]) -> Tree:
    """Return the plan as a tree along the lineage, with each asset below the last of its upstreams."""
    tree = Tree(Text(recipe, style="bold"))
    branches: dict[str, Tree] = {}
    for item in plan.values():
        upstreams = NODES[item.asset].upstreams
        parent = branches[upstreams[-1].asset] if upstreams else tree
        branches[item.asset] = parent.add(planned_line(item, costs.get(item.asset)))
    return tree


def planned_line(item: Planned, cost: Cost | None = None) -> Text:
    """Return a line with an asset, its state, its expected cost, and the reasons."""
    line = Text(item.asset)
    line.append(f"  {item.state}", style=STATE_STYLES[item.state])
    if cost is not None:
        about = "up to" if item.state == "maybe" else "~"
        took = UNTIMED if cost.seconds is None else f"{about} {duration(cost.seconds)}"
        line.append(f"  {took}" if cost.bytes is None else f"  {took}, {human_size(cost.bytes)}")
    if item.reasons:
        line.append("  " + "; ".join(item.reasons), style="dim")
    return line


def plan_total(total: Total, free: int) -> list[Text]:
    """Return the expected cost of the whole run, and a warning if it exceeds the free bytes of the disk."""
    if total.seconds_at_most:
        took = f"a run takes about {_span(duration(total.seconds), duration(total.seconds_at_most))}"
        if total.untimed:
            took += f", not counting {', '.join(total.untimed)} ({UNTIMED})"
    else:
        took = f"how long a run takes is unknown ({UNTIMED})"
    size = f"writes {'at least' if total.unsized else 'about'} "
    size += _span(human_size(total.bytes), human_size(total.bytes_at_most))
    lines = [Text(f"{took}, {size}; {human_size(free)} are free")]
    needed = total.bytes_at_most + total.scratch
    if needed > free:
        text = f"not enough disk space: {human_size(needed)} may be needed, {human_size(free)} are free"
        lines.append(Text(f"{text}; finetune gc removes unneeded artifacts", style="bold red"))
    return lines


def _span(least: str, most: str) -> str:
    return least if least == most else f"{least} (up to {most})"


def known_artifacts(recipe: Recipe, plan: Mapping[str, Planned], store: ArtifactStore) -> dict[str, Artifact]:
    """Return each asset's artifact: the one that the recipe asks for if it is there, else the current one."""
    artifacts = {name: item.artifact or store.current(recipe.name, name) for name, item in plan.items()}
    return {name: artifact for name, artifact in artifacts.items() if artifact is not None}


def artifacts_json(artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """Return `finetune artifacts --json`: asset -> path, fingerprint, data_version, files."""
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
    """Return a table of the artifacts, their sizes, and where they are."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("asset", "size", "where"):
        table.add_column(column, overflow="fold", justify="right" if column == "size" else "left")
    for name, artifact in artifacts.items():
        table.add_row(name, human_size(artifact.size), short_path(artifact.path))
    return table


def serving_lines(recipe: Recipe, artifacts: Mapping[str, Artifact], models: Path) -> list[Text]:
    """Return the name of each asset that can be served, followed by the shell commands that serve it.

    Args:
        models: the project's own Ollama model store.
    """
    lines: list[Text] = []
    for name, artifact in artifacts.items():
        if serving := commands(name, artifact, recipe, models):
            lines += [Text(f"serve {name}", style="bold"), *(Text(f"  {line}") for line in serving)]
    return lines


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """Return the scores of the base and the tuned model on the test rows, side by side."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (f"on {metrics['rows']} test rows", "base", "tuned"):
        table.add_column(column, justify="right" if column in ("base", "tuned") else "left")
    for name in HEADLINES:
        scores = [(metrics.get(side) or {}).get(name) for side in SIDES]
        table.add_row(name, *("-" if score is None else f"{score:.2f}" for score in scores))
    return table


def checks_table(checks: list[Check]) -> Table:
    """Return the table of `finetune doctor`: what each check found, and what to do if something is wrong."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("check", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(check.name, Text(check.state, style=CHECK_STYLES[check.state]), check.found, check.advice or "")
    return table


def short_path(path: Path) -> str:
    """Return the path as a user would type it in the current folder."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def moment(created: str) -> str:
    """Return a manifest's time in the form `2026-11-22 15:45 UTC`."""
    return f"{created[:10]} {created[11:16]} UTC"


def duration(seconds: float) -> str:
    """Return a duration in the form `8.3 s`, `2 min 05 s` or `1 h 12 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
