"""docs/recipe.md is what its script prints."""

from __future__ import annotations

from docs.recipe import page
from finetune_assets.recipe.recipe import sections
from tests.conftest import REPOSITORY


def test_the_page_is_what_its_script_prints():
    committed = (REPOSITORY / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert committed == page(), "run: python -m docs.recipe > docs/recipe.md"


def test_the_page_has_a_row_for_each_key():
    for name, model in sections().items():
        _, _, rest = page().partition(f"## `{name}`\n")
        section = rest.partition("\n## ")[0]
        assert [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")] == [*model.model_fields]
