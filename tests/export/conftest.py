"""Fixtures that several rooms of the export share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def one_thread_each(one_thread: None) -> Iterator[None]:
    """llama.cpp's threads wait for one another by spinning."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune_assets.models.engines.llama_cpp_engine.cores", lambda: 1)
        yield
