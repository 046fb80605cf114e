"""The output of `finetune explain` and `finetune gc`: trees and tables for people, JSON for programs."""

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
    """Return the tree of `finetune explain`: an artifact above its inputs; facts of a repeated input appear once."""
    by_key = {(item.asset, item.fingerprint): item.described() for item in found}
    shown_before: set[tuple[str, str]] = set()

    def add(tree: Tree, key: tuple[str, str], known: Mapping[str, str]) -> None:
        facts = by_key[key]
        if not facts["present"]:
            tree.add(Text("removed, with its manifest", style="yellow"))
            return
        if key in shown_before:
            tree.add(Text("as above", style="dim"))
            return
        shown_before.add(key)
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
    """Return title and text of each line; library versions only if they differ from those of the artifact above."""
    build = f"{moment(facts['created'])}, in {facts['seconds']} s"
    if facts["device"]:
        build += f", on {facts['device']} ({facts['precision']})"
    values = [f"{key} {shown(value)}" for key, value in facts["recipe"].items()]
    libraries = facts["libraries"] if facts["libraries"] != known else {}
    lines = [
        ("built", f"{build}, seed {facts['seed']}"),
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
    """Return the output of `finetune gc --json`."""
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
    """Print the output of `finetune gc`: what is kept and why, what is removed, and how much space that frees."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "what", "built", "size", "reason"):
        table.add_column(column, overflow="fold", justify="right" if column == "size" else "left")
    for item in done.kept:
        artifact = item.artifact
        table.add_row(
            Text("keep", style="green"),
            f"{artifact.manifest['recipe']}/{artifact.manifest['asset']} {artifact.fingerprint[:8]}",
            moment(artifact.created),
            human_size(artifact.size),
            item.reasons[0],
        )
    for item in done.removed:
        artifact = item.artifact
        table.add_row(
            Text("remove", style="yellow"),
            f"{item.recipe}/{artifact.manifest['asset']} {artifact.fingerprint[:8]}"
            if artifact
            else short_path(item.path),
            moment(artifact.created) if artifact else "",
            human_size(item.bytes),
            "nothing needs it"
            if artifact
            else {"blob": "no model uses it"}.get(item.kind, "left behind by an ended run"),
        )
    if table.rows:
        out.print(table, "")
    for path, why in done.left_alone:
        out.print(f"left alone: {short_path(path)}: {why}", markup=False, highlight=False, soft_wrap=True)
    counts = Counter(item.kind for item in done.removed)
    what = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items()) or "nothing to remove"
    out.print(Text(f"{'would free' if dry_run else 'freed'} {human_size(done.freed)}: {what}", style="bold"))
