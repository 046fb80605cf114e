"""Pages in docs/ and README: printed ones are what their scripts print, and every path and link leads somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.pages import PAGES
from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.node import Node
from finetune_assets.recipe import Recipe
from finetune_assets.recipe.gguf_types import TYPES
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.fast

MARKDOWN = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)")
PATH = re.compile(r"`((?:finetune_assets|resources|tests|docs|bench)/[\w./]*|\w+/[\w./]*\.py)`")
SECTIONS = set(Recipe.model_fields)
ROOTS = (REPOSITORY, REPOSITORY / "finetune_assets")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_its_script_prints(name: str) -> None:
    assert (REPOSITORY / "docs" / name).read_text(encoding="utf-8") == PAGES[name](), "run: make pages"


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.name)
def test_every_path_and_link_of_a_page_leads_somewhere(page: Path) -> None:
    assert not list(_dead_ends(page))


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# One title, two words\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](gone.md) [b](there.md#one-title-two-words) [c](there.md#two) `finetune_assets/gone.py` [d](#e)"
    )
    assert list(_dead_ends(page)) == ["gone.md", "there.md#two", "#e", "finetune_assets/gone.py"]


def test_the_readme_counts_the_types() -> None:
    assert f"a table of all {len(TYPES)} types" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("node", NODES.values(), ids=NODES)
def test_the_page_on_identity_names_what_an_asset_reads(node: Node) -> None:
    text = (REPOSITORY / "docs" / "identity.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith(f"| `{node.name}` |"))
    _, _, values, sources, upstreams, _ = (cell.strip() for cell in row.split("|"))
    # a key without its section belongs to the section of the key before it
    keys, section = [], ""
    for key in re.findall(r"`([\w.]+)`", values):
        section = key.rpartition(".")[0] or section
        keys.append(key if "." in key or key in SECTIONS else f"{section}.{key}")
    assert keys == list(node.reads)
    assert set(node.tools()) <= set(re.split(r"[, ]+", sources))
    assert set(re.findall(r"`(\w+)`", upstreams)) == {upstream.asset for upstream in node.upstreams}


def _dead_ends(page: Path) -> Iterator[str]:
    """Find relative links and paths of the repository that do not exist."""
    text = page.read_text(encoding="utf-8")
    for link in LINK.finditer(text):
        target = page.parent / link[1] if link[1] else page
        if not target.exists() or (link[2] and link[2] not in _anchors(target)):
            yield f"{link[1]}#{link[2]}" if link[2] else link[1]
    yield from (path[1] for path in PATH.finditer(text) if not any((root / path[1]).exists() for root in ROOTS))


def _anchors(page: Path) -> set[str]:
    """Return GitHub's anchors of a page's titles."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
