"""A row of the table of GGUF types and a limit are all that a type needs: the rest of the project derives from them."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from finetune_assets.export.gguf import converter
from finetune_assets.export.gguf.quantise import make_types
from finetune_assets.export.ollama.model_store import FILE_TYPE_NAMES
from finetune_assets.export.parity.checks.weights import ROUNDING
from finetune_assets.export.parity.limits import MAX_KL
from finetune_assets.models.formats.gguf import TENSOR_TYPES, read_head
from finetune_assets.recipe import GgufSection
from finetune_assets.recipe.gguf_types import TYPES, UNQUANTISED, GgufType, lossless_type
from tests.support.records.shapes import SHAPES, importance, write

SHAPE = SHAPES["one layer"]
pytestmark = pytest.mark.parametrize("row", TYPES.values(), ids=TYPES)


def test_a_recipe_may_ask_for_it(row: GgufType) -> None:
    assert GgufSection(types=[row.name], max_kl={row.name: 1.0}).types == [row.name]


def test_llama_cpp_and_ollama_know_its_number(row: GgufType) -> None:
    assert gguf.LlamaFileType(row.file_type).name in (f"MOSTLY_{row.name.upper()}", f"ALL_{row.name.upper()}")
    assert FILE_TYPE_NAMES[row.file_type] == row.name.upper()


def test_its_bits_are_those_of_its_tensors_or_more(row: GgufType) -> None:
    stored = TENSOR_TYPES[row.tensor_type]
    bits = stored.size * 8 / stored.block
    assert row.bits == bits if row.name in UNQUANTISED else bits * 0.99 < row.bits < bits * 1.3


def test_it_has_limits(row: GgufType) -> None:
    assert 0 < MAX_KL[row.name] <= 2
    assert row.is_quantised == (row.tensor_type in ROUNDING)


def test_it_is_made_and_says_what_it_is(row: GgufType, tmp_path: Path) -> None:
    source = write(SHAPE, tmp_path / "source.gguf")
    head = read_head(make_types(source, [row.name], tmp_path, "x")[row.name])
    assert head.get("general.file_type") == row.file_type
    assert row.tensor_type in {tensor.type for tensor in head.tensors}
    assert any(tensor.is_quantised for tensor in head.tensors) == row.is_quantised


def test_an_importance_matrix_changes_it_or_not(row: GgufType, tmp_path: Path) -> None:
    source = write(SHAPE, tmp_path / "source.gguf")
    plain = make_types(source, [row.name], tmp_path, "plain")[row.name]
    weighed = make_types(source, [row.name], tmp_path, "weighed", importance(SHAPE))[row.name]
    assert (weighed.read_bytes() != plain.read_bytes()) == row.uses_imatrix


def test_it_is_the_source_of_the_others_where_it_loses_nothing(
    row: GgufType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if row.is_quantised:
        assert row.name not in UNQUANTISED
        return
    monkeypatch.setattr(converter, "stored_types", lambda folder: {row.tensor_type})
    assert converter.natural_type(tmp_path) == lossless_type([row.tensor_type]) == row.name
