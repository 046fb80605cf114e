"""Files have the form that `llama-quantize COPY` leaves as it is, and other files are brought into it.

What the tool makes of ours is on record too (see test_shapes.py); here it runs, where it was built.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_assets.export.gguf import converter
from finetune_assets.export.gguf.form import cut_texts, in_form, is_in_form, write_in_form
from finetune_assets.export.gguf.quantise import make_types
from finetune_assets.models.formats.gguf import ARRAY, STRING, UINT32, Head, Tensor, read_head
from finetune_assets.recipe.gguf_types import FILE_TYPES
from finetune_assets.reporting.errors import StepFailed
from tests.conftest import shared_cache
from tests.support.export_fixtures import converter_cache, tiny_base, tiny_tokenizer
from tests.support.records.shapes import SHAPES, digests, write


def llama_quantize() -> Path | None:
    """The tool that bench/llama_tools.py builds, or that of a llama.cpp build named by LLAMA_CPP_BIN."""
    built = shared_cache() / f"llama.cpp-{converter.VERSION}-build" / "bin"
    tool = Path(os.environ.get("LLAMA_CPP_BIN") or built) / "llama-quantize"
    return tool if tool.is_file() else None


needs_tool = pytest.mark.skipif(llama_quantize() is None, reason="no llama-quantize here (bench/llama_tools.py)")


def copied(file: Path) -> bytes:
    """What llama-quantize makes of a file when it is told to copy it."""
    target = file.with_suffix(".copy")
    command = [str(llama_quantize()), str(file), str(target), "COPY"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return target.read_bytes()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_base(tmp_path_factory.mktemp("model") / "model", tied=False, hidden_size=256)
    tiny_tokenizer(folder)
    return folder


def rewritten(source: Path, target: Path) -> Path:
    write_in_form(source, read_head(source), target)
    return target


def test_the_converter_writes_in_this_form(gguf: Path) -> None:
    head = read_head(gguf)
    assert is_in_form(head) and in_form(head).encode() == gguf.read_bytes()[: head.data_start]
    assert [tensor.name for tensor in head.tensors[:4]] == [
        *("output.weight", "output_norm.weight", "token_embd.weight", "blk.0.attn_k.weight")
    ]
    assert list(head.raw)[-2:] == ["general.quantization_version", "general.file_type"]
    assert head.get("tokenizer.ggml.add_bos_token") is False, "corrected while it was written"


def test_another_converter_s_file_is_written_again(
    gguf: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    """A checkout's script writes as it likes, and gives the same file in the end."""
    monkeypatch.setenv("LLAMA_CPP_DIR", str(converter.converter_dir(converter_cache(request.config))))
    written: list[Path] = []
    monkeypatch.setattr(converter, "write_in_form", lambda *given: (written.append(given[0]), write_in_form(*given))[1])
    converter.convert(model, tmp_path / "again.gguf", "f32", tmp_path, name="tiny")
    assert len(written) == 1
    assert (tmp_path / "again.gguf").read_bytes() == gguf.read_bytes()


@needs_tool
def test_every_type_of_a_real_model_is_copied_as_it_is(gguf: Path, tmp_path: Path) -> None:
    for kind, file in make_types(gguf, list(FILE_TYPES), tmp_path, "tiny").items():
        assert copied(file) == file.read_bytes(), kind


@needs_tool
@pytest.mark.parametrize("name", ["eight layers", "gemma3n", "mamba", "rwkv6", "t5", "deepseek2, split"])
def test_llama_quantize_makes_of_any_file_what_we_make_of_it(name: str, tmp_path: Path) -> None:
    source = write(SHAPES[name], tmp_path / "source.gguf")
    assert not is_in_form(read_head(source))
    ours = rewritten(source, tmp_path / "ours.gguf")
    assert copied(source) == ours.read_bytes() == copied(ours)


@needs_tool
def test_odd_metadata(tmp_path: Path) -> None:
    """Pieces of a divided file, an alignment of its own, empty arrays, version 2, trailing ones, a NUL."""
    plain = write(SHAPES["one layer"], tmp_path / "plain.gguf")
    head = read_head(plain)
    text = struct.pack("<Q", 3) + b"a\0b"
    head = replace(head, raw={"split.count": (2, b"\1\0"), "split.no": (2, b"\0\0"), **head.raw}, version=2)
    head = replace(head, raw={**head.raw, "general.quantization_version": (UINT32, struct.pack("<I", 1))})
    head = replace(head, raw={**head.raw, "x.empty": (ARRAY, struct.pack("<IQ", 5, 0)), "x.nul": (STRING, text)})
    head = replace(head, raw={**head.raw, "x.texts": (ARRAY, struct.pack("<IQ", STRING, 2) + text + text)})
    head = head.with_value("general.alignment", UINT32, 32)
    first = replace(head.tensors[0], shape=(*head.tensors[0].shape, 1, 1))
    head = replace(head, tensors=(first, *head.tensors[1:]))
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(head.encode() + plain.read_bytes()[read_head(plain).data_start :])
    ours = rewritten(odd, tmp_path / "ours.gguf")
    made = read_head(ours)
    assert made.get("general.quantization_version") == 2 and made.version == 3
    assert not {"split.count", "split.no", "general.alignment"} & set(made.raw)
    assert made.get("x.nul") == "a\0b" and made.get("x.empty") == []
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(copied(ours))
    assert read_head(copy).get("x.texts") == ["a", "a"] and read_head(copy) != made
    cut = cut_texts(made)
    # an alignment other than 32 the tool itself gets wrong; a text it ends at a NUL; the rest is copied as it is
    assert [*cut.raw.items()] == [k for k in read_head(copy).raw.items() if k[0] != "general.alignment"]
    assert cut.tensors == read_head(copy).tensors


def test_another_alignment(tmp_path: Path) -> None:
    """The key goes, and with it the gaps: every reader finds the same bytes."""
    plain = write(SHAPES["nine layers, tied"], tmp_path / "plain.gguf")
    before = read_head(plain)
    wide = before.with_value("general.alignment", UINT32, 128).laid_out(before.tensors)
    file = tmp_path / "wide.gguf"
    with file.open("wb") as out:
        out.write(wide.encode())
        data_start = out.tell()
        for old, new in zip(before.tensors, wide.tensors, strict=True):
            out.seek(data_start + new.offset)
            out.write(plain.read_bytes()[before.data_start + old.offset :][: old.nbytes])
        out.truncate(data_start + wide.data_size)
    assert read_head(file).alignment == 128
    made = rewritten(file, tmp_path / "made.gguf")
    assert digests(made) == digests(plain)
    assert made.read_bytes() == rewritten(plain, tmp_path / "again.gguf").read_bytes()


def test_layers_are_sorted_as_numbers(tmp_path: Path) -> None:
    names = ("token_embd.weight", "blk.10.a.weight", "blk.2.b.weight", "blk.2.a.weight", "output.weight", "v.blk.1.x")
    table = [Tensor(name, (8, 1), 0, 0) for name in names]
    head = in_form(Head(3, {}, (), 0).laid_out(table))
    assert [tensor.name for tensor in head.tensors] == [
        *("output.weight", "token_embd.weight", "v.blk.1.x", "blk.2.a.weight", "blk.2.b.weight", "blk.10.a.weight")
    ]
    assert [tensor.offset for tensor in head.tensors] == [0, 32, 64, 96, 128, 160]
    assert {tensor.shape for tensor in head.tensors} == {(8,)}


def test_a_type_that_we_do_not_know(tmp_path: Path) -> None:
    """Its size is not known: it can be recognised as sorted, and not written anew."""
    number = 39  # MXFP4
    table = (Tensor("a.weight", (32, 1), number, 32), Tensor("b.weight", (32,), 0, 0))
    head = Head(3, {}, table, 0)
    assert not is_in_form(head)
    assert is_in_form(
        replace(head, raw=in_form(Head(3, {}, (), 0)).raw, tensors=(replace(table[0], shape=(32,)), table[1]))
    )
    with pytest.raises(StepFailed, match=r"tensor a\.weight has GGML type 39"):
        in_form(head)


def test_a_source_that_ends_too_early(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Path(shutil.copy(gguf, tmp_path / "cut.gguf"))
    head = read_head(cut)
    monkeypatch.setattr("finetune_assets.export.gguf.form.read_head", lambda path: head)
    os.truncate(cut, head.data_start + 1000)
    with pytest.raises(StepFailed, match="ends within tensor output"):
        write_in_form(cut, head, tmp_path / "x.gguf")


def test_memory_is_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks smaller than tensors give the same file."""
    source = write(SHAPES["more rows than a block"], tmp_path / "source.gguf")
    whole = rewritten(source, tmp_path / "whole.gguf").read_bytes()
    monkeypatch.setattr("finetune_assets.export.gguf.form.BLOCK", 1000)
    assert rewritten(source, tmp_path / "blocks.gguf").read_bytes() == whole
    assert np.frombuffer(whole[:4], np.uint8).tobytes() == b"GGUF"
