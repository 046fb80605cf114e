"""Types and bytes for models of many shapes, with and without an importance matrix, are llama.cpp's.

data/shapes.json holds what its own quantiser answered (see make_shapes.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune_assets.export.gguf import quantise
from finetune_assets.export.gguf.quantise import make_types
from finetune_assets.export.gguf.type_policy import tensor_types
from finetune_assets.models.formats.gguf import read_head
from finetune_assets.recipe.gguf_types import FILE_TYPES, IMATRIX_TYPES
from finetune_assets.store.digests import digest_of_file
from tests.support.records.shapes import BYTES, SHAPES, described, digest, importance, in_form, joined, write

REFERENCE = json.loads((Path(__file__).parents[2] / "fixtures/shapes.json").read_text())
GIVEN_UP = ("some rows of 328", "some rows of 100, tied", "rows of 200", "mamba")  # rows that are no multiple of 32
COPIED = (
    "one layer", "nine layers, tied", "rows of 288", "some rows of 100, tied", "qwen2 72B", "falcon, tied", "phi3",
    "gemma2", "gemma3n", "lfm2", "mamba", "rwkv6", "t5", "8 experts, tied", "qwen3moe, 12 experts", "deepseek2, split",
)  # fmt: skip
"""The models whose files the tests compare with llama.cpp's copies; the others' are compared in make_shapes."""


def answers(part: str, name: str, kind: str) -> dict[bool, str]:
    """What llama.cpp makes without and with an importance matrix; nothing where it gives up."""
    plain = REFERENCE[part][name].get(kind)
    return {False: plain, True: REFERENCE[part][name].get(f"{kind} weighed", plain)} if plain else {}


@pytest.mark.parametrize("name", SHAPES)
def test_types(name: str, tmp_path: Path) -> None:
    head = read_head(write(SHAPES[name], tmp_path / "source.gguf"))
    asked = 0
    for kind in FILE_TYPES:
        for weighed, wanted in answers("types", name, kind).items():
            found = described(head, tensor_types(head, kind, weighed and kind in IMATRIX_TYPES))
            assert found == wanted, (kind, weighed)
            asked += 1
    assert asked == 2 * len(FILE_TYPES) or name in GIVEN_UP


@pytest.mark.parametrize("chunk", [quantise.CHUNK, 1000])
@pytest.mark.parametrize("name", BYTES)
def test_bytes(name: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantise, "CHUNK", chunk)
    source = write(SHAPES[name], tmp_path / "source.gguf")
    for kind in FILE_TYPES if chunk > 1000 else ("q4_k_m", "q5_0", "q6_k", "q8_0"):
        for weighed, wanted in answers("bytes", name, kind).items():
            made = make_types(source, [kind], tmp_path, "x", importance(SHAPES[name]) if weighed else None)[kind]
            assert digest(made) == wanted, (kind, weighed)


@pytest.mark.parametrize("name", COPIED)
def test_llama_quantize_copies_our_files_as_they_are(name: str, tmp_path: Path) -> None:
    """On record is the digest of what `llama-quantize COPY` made of the same files."""
    source = in_form(SHAPES[name], tmp_path / "source.gguf")
    made = [
        digest_of_file(make_types(source, [kind], tmp_path, "x", importance(SHAPES[name]) if weighed else None)[kind])
        for kind in FILE_TYPES
        for weighed in (False, True)
    ]
    assert joined(made) == REFERENCE["copies"][name]


@pytest.mark.parametrize("name", GIVEN_UP)
def test_where_llama_cpp_gives_up_rows_stay_float16(name: str, tmp_path: Path) -> None:
    head = read_head(write(SHAPES[name], tmp_path / "source.gguf"))
    odd = [at for at, tensor in enumerate(head.tensors) if len(tensor.shape) > 1 and tensor.shape[0] % 32]
    for kind in FILE_TYPES:
        types = tensor_types(head, kind)
        assert {types[at] for at in odd} <= {"F16", "F32", "BF16"} | {head.tensors[at].type for at in odd}
        assert kind in ("f32", "f16", "bf16") or "F16" in {types[at] for at in odd}
