"""docs/limits.md is what its script prints."""

from __future__ import annotations

import pytest

from docs.limits import page
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.fast


def test_the_page_is_what_its_script_prints():
    committed = (REPOSITORY / "docs" / "limits.md").read_text(encoding="utf-8")
    assert committed == page(), "run: python -m docs.limits > docs/limits.md"
