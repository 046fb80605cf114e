"""A merged model and held-out rows, which the proofs of this room read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.export_fixtures import held_out_rows, opinionated


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return held_out_rows(tmp_path_factory.mktemp("data") / "test.jsonl")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return opinionated(tmp_path_factory)
