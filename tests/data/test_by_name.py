"""Every row format that a registry entry may name is in its table."""

from __future__ import annotations

from typing import get_args

import pytest

from finetune_assets.data.formats.by_name import FORMATS
from finetune_assets.data.registry import Entry

pytestmark = pytest.mark.fast


def test_the_table_holds_what_registries_may_name() -> None:
    assert set(FORMATS) == set(get_args(Entry.model_fields["formatting"].annotation))
