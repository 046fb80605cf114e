"""The output of `finetune verify`: a table for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune_assets.export.ollama.served_checks import Check


def all_good(found: Mapping[str, Sequence[Check]]) -> bool:
    """Return True if every check passed."""
    return all(check.ok for checks in found.values() for check in checks)


def verification_json(found: Mapping[str, Sequence[Check]]) -> list[dict[str, Any]]:
    """Return subject, name, result and finding of each check."""
    return [
        {"subject": subject, "check": check.name, "ok": check.ok, "found": check.found}
        for subject, checks in found.items()
        for check in checks
    ]


def print_verification(out: Console, found: Mapping[str, Sequence[Check]]) -> None:
    """Print a table for each subject, and the verdict."""
    for subject, checks in found.items():
        table = Table(box=None, pad_edge=False, show_header=False)
        for check in checks:
            word = Text("ok", style="green") if check.ok else Text("failed", style="bold red")
            table.add_row(f"  {check.name}", word, Text(check.found, overflow="fold"))
        out.print(Text(subject, style="bold"), soft_wrap=True)
        out.print(table)
    failed = sum(not check.ok for checks in found.values() for check in checks)
    total = sum(map(len, found.values()))
    verdict = f"{failed} of {total} checks failed" if failed else f"{total} checks, all good"
    out.print(Text(verdict, style="bold red" if failed else "bold green"))
