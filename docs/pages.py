"""The pages that are made from the code alone, within seconds; `make test` fails when one differs from its script.

usage: python -m docs.pages   (or: make pages)
The other printed pages need a finished run of the demo: docs/{battery,changes,ollama,serving,templates}.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from docs import architecture, automation, limits, recipe

DOCS = Path(__file__).resolve().parent
PAGES: dict[str, Callable[[], str]] = {
    "architecture.md": architecture.page,
    "automation.md": automation.page,
    "limits.md": limits.page,
    "recipe.md": recipe.page,
}


def main() -> None:
    """Write every page."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
