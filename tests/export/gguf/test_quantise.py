"""Types made from one GGUF file: the bytes that llama.cpp makes, all metadata kept, little memory."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from finetune_assets.export.gguf import converter, ggml, quantise
from finetune_assets.export.gguf.form import place
from finetune_assets.export.gguf.quantise import Imatrix, make_types
from finetune_assets.models.formats.gguf import Head, Tensor, read_head
from finetune_assets.recipe.gguf_types import FILE_TYPES, IMATRIX_TYPES
from finetune_assets.reporting.errors import BadInput, StepFailed
from tests.support.export_fixtures import converter_cache

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
        assert list(made) == (list(tensors) if kind == source_kind else sorted(tensors, key=place))
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
            assert np.asarray(tensor.data).tobytes() == np.asarray(again).tobytes(), (
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
    whole = source.read_bytes()
    make_types(write(tmp_path / "other.gguf", "f16"), ["f32"], tmp_path / "a", "tiny")
    assert source.read_bytes() == whole, "written through a second name"


def test_refusals(tmp_path: Path) -> None:
    source = write(tmp_path / "source.gguf")
    with pytest.raises(BadInput, match="q9_9"):
        make_types(source, ["q9_9"], tmp_path, "x")
    q8 = make_types(source, ["q8_0"], tmp_path, "x")["q8_0"]
    with pytest.raises(StepFailed, match="not of full precision"):
        make_types(q8, ["f16"], tmp_path, "y")
    big = write(tmp_path / "big.gguf", change=lambda name, data: data * 1e5)
    with pytest.raises(StepFailed, match="holds weights beyond F16"):
        make_types(big, ["f16"], tmp_path, "big")
    nan = write(tmp_path / "nan.gguf", change=lambda name, data: data * np.float32("nan"))
    with pytest.raises(StepFailed, match="NaN"):
        make_types(nan, ["q8_0"], tmp_path, "nan")


def test_without_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "source.gguf")
    monkeypatch.setattr(
        "finetune_assets.export.gguf.ggml.library", ggml.library.__wrapped__
    )  # what was loaded stays away
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StepFailed, match="xllamacpp is not installed"):
        make_types(source, ["q8_0"], tmp_path, "x")
    package = tmp_path / "xllamacpp" / "__init__.py"  # of which nothing is exported
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin=str(package)))
    with pytest.raises(StepFailed, match="does not export ggml_quantize_chunk"):
        make_types(source, ["q8_0"], tmp_path, "x")


@pytest.mark.real
def test_real_model_equals_llama_cpp(smollm2: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Digests in data/quantised_tensors.json are llama.cpp's own."""
    source = tmp_path / "source.gguf"
    converter.convert(smollm2, source, "f32", converter_cache(request.config), name="smollm2")
    reference = json.loads((Path(__file__).parents[2] / "fixtures/quantised_tensors.json").read_text())
    for kind, file in make_types(source, TYPES, tmp_path, "smollm2").items():
        head = read_head(file)
        with file.open("rb") as data:
            for tensor in head.tensors:
                if tensor.name in reference[kind]:
                    data.seek(head.data_start + tensor.offset)
                    digest = hashlib.sha256(data.read(tensor.nbytes)).hexdigest()
                    assert digest == reference[kind].pop(tensor.name), (kind, tensor.name)
        assert reference[kind] == {}


def weighed(**changes: np.ndarray | None) -> Imatrix:
    """An importance matrix for the file of `write`; names with `__` for dots, None takes an entry out."""
    rng = np.random.default_rng(1)
    values: dict[str, Any] = {
        "blk.0.attn_q.weight": rng.random((1, 64), np.float32),
        "blk.0.ffn_up_exps.weight": rng.random((4, 64), np.float32),
        "of.another.model": np.ones((1, 7), np.float32),
    }
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    kept = {name: value for name, value in values.items() if value is not None}
    return Imatrix(kept, file="here/imatrix.gguf", dataset="ä" * 100, chunks=7)


def test_an_importance_matrix_changes_what_it_covers_and_is_named_in_the_metadata(tmp_path: Path) -> None:
    source = write(tmp_path / "source.gguf")
    plain = make_types(source, ["q4_0"], tmp_path / "plain", "x")["q4_0"]
    made = make_types(source, ["q4_0"], tmp_path / "weighed", "x", weighed())["q4_0"]
    (before, without), (after, tensors) = read(plain), read(made)
    changed = {name for name in tensors if not np.array_equal(tensors[name].data, without[name].data)}
    assert changed == {"blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"}
    told = {key: value for key, value in after.items() if key not in before}
    assert told == {
        "quantize.imatrix.file": "here/imatrix.gguf",
        "quantize.imatrix.dataset": "ä" * 63,  # 127 bytes hold no more
        "quantize.imatrix.entries_count": 3,
        "quantize.imatrix.chunks_count": 7,
    }
    # each expert's matrix is weighed by its own entry
    values = weighed().values["blk.0.ffn_up_exps.weight"].copy()
    values[2] = values[2, ::-1]
    other = make_types(source, ["q4_0"], tmp_path / "other", "x", weighed(blk__0__ffn_up_exps__weight=values))["q4_0"]
    found = np.asarray(read(other)[1]["blk.0.ffn_up_exps.weight"].data)
    same = [np.array_equal(found[n], tensors["blk.0.ffn_up_exps.weight"].data[n]) for n in range(4)]
    assert same == [True, True, False, True]


def test_types_that_round_each_weight_by_itself_are_left_as_they_are(tmp_path: Path) -> None:
    source = write(tmp_path / "source.gguf")
    plain = make_types(source, TYPES, tmp_path / "plain", "x")
    for kind, file in make_types(source, TYPES, tmp_path / "weighed", "x", weighed()).items():
        assert kind not in IMATRIX_TYPES and file.read_bytes() == plain[kind].read_bytes()
    (file,) = make_types(source, ["q4_0"], tmp_path / "none", "x", Imatrix({})).values()
    assert "quantize.imatrix.file" not in read(file)[0]


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        (
            "blk__0__attn_q__weight",
            np.ones((1, 65), np.float32),
            r"65 values for blk\.0\.attn_q\.weight instead of 1 x 64",
        ),
        ("blk__0__ffn_up_exps__weight", np.ones((1, 64), np.float32), "64 values for .*instead of 4 x 64"),
        ("blk__0__attn_q__weight", np.full((1, 64), np.nan, np.float32), "NaN or infinite values for blk.0.attn_q"),
        ("token_embd__weight", np.ones((1, 7), np.float32), None),
        ("blk__0__ffn_gate_inp__weight", np.ones((1, 7), np.float32), None),  # not quantised
    ],
)
def test_an_importance_matrix_of_another_model(
    entry: str, value: np.ndarray, message: str | None, tmp_path: Path
) -> None:
    source = write(tmp_path / "source.gguf")
    if message is None:
        make_types(source, ["q4_0"], tmp_path, "x", weighed(**{entry: value}))
    else:
        with pytest.raises(StepFailed, match=message):
            make_types(source, ["q4_0"], tmp_path, "x", weighed(**{entry: value}))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="where else the peak is told is not known")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A file of 256 MB in a process of its own: less than a quarter of it, Python and all libraries counted."""
    raw = read_head(write(tmp_path / "small.gguf", "f16")).raw
    large = Head(3, raw, (Tensor("blk.0.ffn_up.weight", (2048, 1 << 16), 1, 0),), 0)
    with (tmp_path / "large.gguf").open("wb") as out:
        out.write(large.encode())
        out.truncate(out.tell() + large.data_size)
    work = (
        "import sys; from pathlib import Path; from finetune_assets.export.gguf import quantise;"
        "quantise.make_types(Path(sys.argv[1]), ['q8_0'], Path(sys.argv[2]), 'x');"
        "print(Path('/proc/self/status').read_text())"
    )
    arguments = [str(tmp_path / "large.gguf"), str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", work, *arguments], capture_output=True, text=True, check=True)
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert int(peak) * 1024 < (tmp_path / "large.gguf").stat().st_size / 4
