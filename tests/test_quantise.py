"""Types made from one GGUF file: the bytes that llama.cpp makes, all metadata kept, little memory."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_assets.errors import BadInput, StepFailed
from finetune_assets.export import converter, quantise
from finetune_assets.export.gguf_file import FILE_TYPES, read_head
from finetune_assets.export.quantise import make_types
from tests.export_fixtures import converter_cache

TYPES = ["f32", "f16", "bf16", "q8_0"]


def write(path: Path, kind: str = "f32", change: Any = None) -> Path:
    """A GGUF file by the gguf package: matrices and others, and metadata of every kind."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_array("test.names", ["one", "zwei", "三"])
    writer.add_array("test.numbers", [1, 2, 3])
    writer.add_float64("test.double", 1 / 3)
    writer.add_bool("test.flag", True)
    writer.add_string("tokenizer.chat_template", "{{ x }}\n")
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (96, 64), "blk.0.attn_norm.weight": (64,), "blk.0.attn_q.weight": (64, 64),
        "blk.0.ffn_gate_inp.weight": (8, 64), "blk.0.ffn_up_exps.weight": (4, 32, 64), "blk.0.odd.weight": (3, 48),
        "blk.0.attn_q.bias": (64,), "blk.0.row.weight": (1, 64),
    }  # fmt: skip
    for name, shape in shapes.items():
        data = (rng.standard_normal(shape) * 3).astype(np.float32)
        if change is not None:
            data = change(name, data)
        if kind == "bf16" and len(shape) > 1:
            writer.add_tensor(name, gguf.quantize(data, gguf.GGMLQuantizationType.BF16), raw_dtype=BF16())
        else:
            writer.add_tensor(name, data.astype(np.float16) if kind == "f16" and len(shape) > 1 else data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def BF16() -> Any:
    import gguf

    return gguf.GGMLQuantizationType.BF16


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    import gguf

    reader = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return values, {tensor.name: tensor for tensor in reader.tensors}


def exact(tensor: Any) -> np.ndarray:
    import gguf

    return gguf.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize("source_kind", ["f32", "f16", "bf16"])
def test_bytes_types_and_metadata(tmp_path: Path, source_kind: str) -> None:
    import gguf

    source = write(tmp_path / "source.gguf", source_kind)
    files = make_types(source, TYPES, tmp_path / "out", "tiny")
    before, tensors = read(source)
    for kind, file in files.items():
        assert file.name == f"tiny-{kind}.gguf"
        after, made = read(file)
        assert after.pop("general.file_type") == FILE_TYPES[kind]
        assert after.pop("general.quantization_version", 2) == 2
        assert after == {key: value for key, value in before.items() if key != "general.file_type"}
        assert list(made) == list(tensors)
        for name, tensor in made.items():
            whole = name in (
                "blk.0.attn_norm.weight",
                "blk.0.ffn_gate_inp.weight",
                "blk.0.attn_q.bias",
                "blk.0.row.weight",
            )
            wanted = tensors[name].tensor_type.name if whole else kind.upper()
            if name == "blk.0.odd.weight" and kind == "q8_0":
                wanted = "F16"  # rows of 48 are no multiple of a block
            assert tensor.tensor_type.name == wanted, (kind, name)
            again = gguf.quantize(exact(tensors[name]), tensor.tensor_type)  # numpy: another implementation
            assert np.array_equal(np.asarray(tensor.data).view(np.uint8), np.asarray(again).view(np.uint8)), (
                kind,
                name,
            )


def test_same_bytes_again_and_with_other_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "source.gguf")
    first = make_types(source, TYPES, tmp_path / "a", "tiny")
    monkeypatch.setattr(quantise, "CHUNK", 100)
    second = make_types(source, TYPES, tmp_path / "b", "tiny")
    assert [first[kind].read_bytes() == second[kind].read_bytes() for kind in TYPES] == [True] * 4
    assert first["f32"].samefile(source)


def test_refusals(tmp_path: Path) -> None:
    source = write(tmp_path / "source.gguf")
    with pytest.raises(BadInput, match="q9_9"):
        make_types(source, ["q9_9"], tmp_path, "x")
    q8 = make_types(source, ["q8_0"], tmp_path, "x")["q8_0"]
    with pytest.raises(StepFailed, match="not of full precision"):
        make_types(q8, ["f16"], tmp_path, "y")
    big = write(tmp_path / "big.gguf", change=lambda name, data: data * 1e5)
    with pytest.raises(StepFailed, match="does not fit float16"):
        make_types(big, ["f16"], tmp_path, "big")
    nan = write(tmp_path / "nan.gguf", change=lambda name, data: data * np.float32("nan"))
    with pytest.raises(StepFailed, match="NaN"):
        make_types(nan, ["q8_0"], tmp_path, "nan")


@pytest.mark.real
def test_real_model_equals_llama_cpp(smollm2: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Digests in data/quantised_tensors.json are llama.cpp's own."""
    source = tmp_path / "source.gguf"
    converter.convert(smollm2, source, "f32", converter_cache(request.config), name="smollm2")
    reference = json.loads((Path(__file__).parent / "data/quantised_tensors.json").read_text())
    for kind, file in make_types(source, TYPES, tmp_path, "smollm2").items():
        head = read_head(file)
        with file.open("rb") as data:
            for tensor in head.tensors:
                if tensor.name in reference[kind]:
                    data.seek(head.data_start + tensor.offset)
                    digest = hashlib.sha256(data.read(tensor.nbytes)).hexdigest()
                    assert digest == reference[kind].pop(tensor.name), (kind, tensor.name)
        assert reference[kind] == {}
