"""The position at which two sequences begin to differ."""

from __future__ import annotations

import pytest

from finetune_assets.reporting.first_difference import first_difference

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("one", "other", "position"),
    [("", "", 0), ("abc", "abd", 2), ("abc", "ab", 2), ([], [1], 0), ([1, 2], [1, 2], 2), ((1, 2), [3, 2], 0)],
)
def test_the_first_position_that_differs(one: str | list[int], other: str | list[int], position: int) -> None:
    assert first_difference(one, other) == first_difference(other, one) == position
