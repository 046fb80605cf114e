"""What was made of what, and what went: for people and for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from finetune_assets.cli.tables import human_size, moment, short_path
from finetune_assets.lineage.ancestry import Ancestor
from finetune_assets.lineage.identity import shown
from finetune_assets.lineage.retention import Collection

SHORT = 12  # digits of a digest that are shown


def ancestry_tree(recipe: str, found: Sequence[Ancestor]) -> Tree:
    """`finetune explain`: an artifact, and below it what it was made of; one that is met again is not told again."""
    by_key = {(item.asset, item.fingerprint): item.described() for item in found}
    told: set[tuple[str, str]] = set()

    def add(tree: Tree, key: tuple[str, str], known: Mapping[str, str]) -> None:
        facts = by_key[key]
        if not facts["present"]:
            tree.add(Text("no longer there: its manifest went with it", style="yellow"))
            return
        if key in told:
            tree.add(Text("as above", style="dim"))
            return
        told.add(key)
        for title, text in _lines(facts, known):
            tree.add(Text.assemble((f"{title}  ", "dim"), text))
        for below in facts["inputs"].items():
            add(tree.add(_name(*below)), below, facts["libraries"])

    top = (found[0].asset, found[0].fingerprint)
    tree = Tree(_name(f"{recipe}/{top[0]}", top[1]))
    add(tree, top, {})
    return tree


def _name(asset: str, fingerprint: str) -> Text:
    return Text.assemble((asset, "bold"), f" {fingerprint}")


def _lines(facts: Mapping[str, Any], known: Mapping[str, str]) -> list[tuple[str, str]]:
    """Title and text of each line; library versions only where they are not those of what was made of it."""
    made = f"{moment(facts['created'])}, in {facts['seconds']} s"
    if facts["device"]:
        made += f", on {facts['device']} ({facts['precision']})"
    values = [f"{key} {shown(value)}" for key, value in facts["recipe"].items()]
    libraries = facts["libraries"] if facts["libraries"] != known else {}
    lines = [
        ("made", f"{made}, seed {facts['seed']}"),
        ("data version", facts["data_version"]),
        ("recipe", ", ".join(values) or "all defaults"),
        ("sources", _pairs(facts["sources"])),
        ("rows", _pairs(facts["rows"])),
        ("metrics", _pairs(facts["metrics"])),
        ("tools", _pairs(facts["tools"])),
        ("libraries", _pairs(libraries)),
    ]
    return [(title, text) for title, text in lines if text]


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_brief(value)}" for key, value in values.items())


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "+".join(value)
    text = str(value)
    return text[:SHORT] if len(text) in (40, 64) and not set(text) - set("0123456789abcdef") else shown(value)


def collection_json(done: Collection, dry_run: bool) -> dict[str, Any]:
    """`finetune gc --json`."""
    return {
        "dry_run": dry_run,
        "freed_bytes": done.freed,
        "removed": [
            {
                "kind": item.kind,
                "recipe": item.recipe,
                "asset": item.artifact.manifest["asset"] if item.artifact else None,
                "fingerprint": item.artifact.fingerprint if item.artifact else None,
                "path": str(item.path),
                "bytes": item.bytes,
            }
            for item in done.removed
        ],
        "kept": [
            {
                "recipe": item.artifact.manifest["recipe"],
                "asset": item.artifact.manifest["asset"],
                "fingerprint": item.artifact.fingerprint,
                "path": str(item.artifact.path),
                "bytes": item.artifact.size,
                "reasons": list(item.reasons),
            }
            for item in done.kept
        ],
        "left_alone": [{"path": str(path), "reason": why} for path, why in done.left_alone],
    }


def print_collection(out: Console, done: Collection, dry_run: bool) -> None:
    """`finetune gc`: what stays and why, what goes, and how much the disk gets back."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "what", "made", "size", "why"):
        table.add_column(column, overflow="fold", justify="right" if column == "size" else "left")
    for item in done.kept:
        artifact = item.artifact
        table.add_row(
            Text("stays", style="green"),
            f"{artifact.manifest['recipe']}/{artifact.manifest['asset']} {artifact.fingerprint[:8]}",
            moment(artifact.created),
            human_size(artifact.size),
            item.reasons[0],
        )
    for item in done.removed:
        artifact = item.artifact
        table.add_row(
            Text("goes", style="yellow"),
            f"{item.recipe}/{artifact.manifest['asset']} {artifact.fingerprint[:8]}"
            if artifact
            else short_path(item.path),
            moment(artifact.created) if artifact else "",
            human_size(item.bytes),
            "nothing needs it" if artifact else {"blob": "of no model"}.get(item.kind, "left by a builder that ended"),
        )
    if table.rows:
        out.print(table, "")
    for path, why in done.left_alone:
        out.print(f"left alone: {short_path(path)}: {why}", markup=False, highlight=False, soft_wrap=True)
    counts = Counter(item.kind for item in done.removed)
    what = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items()) or "nothing to remove"
    out.print(Text(f"{'would free' if dry_run else 'freed'} {human_size(done.freed)}: {what}", style="bold"))
