"""Models and GGUF files that several tests of this room share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.export_fixtures import converted, talkative, tiny_base


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with all that a merged model has."""
    return talkative(tiny_base(tmp_path_factory.mktemp("model") / "merged", tied=False, initializer_range=0.2))


@pytest.fixture(scope="module")
def gguf(model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The GGUF file of the module's model, alone in its folder."""
    return converted(model, tmp_path_factory.mktemp("gguf") / "tiny.gguf", request.config)
