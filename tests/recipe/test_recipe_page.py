"""docs/recipe.md, as its script prints it; tests/whole/test_pages.py compares the two."""

from __future__ import annotations

import pytest

from docs.recipe import page
from finetune_assets.recipe.recipe import sections

pytestmark = pytest.mark.fast


def test_the_page_has_a_row_for_each_key():
    for name, model in sections().items():
        _, _, rest = page().partition(f"## `{name}`\n")
        section = rest.partition("\n## ")[0]
        assert [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")] == [*model.model_fields]
