"""The converter child process and the GGUF head: what llama.cpp makes of a merged model, and that it runs."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.export.gguf import converter
from finetune_assets.models import wheels as packaged
from finetune_assets.models.formats.gguf import ARRAY, STRING, UINT32, Head, Tensor, read_head
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.store.digests import digest_of_file
from tests.support.export_fixtures import CHATML, converter_cache, tiny_base, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_base(tmp_path_factory.mktemp("model") / "0f3a-7B-v2", tied=False)
    tiny_tokenizer(folder)
    return folder


def test_metadata_and_weights(gguf: Path, model: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file

    head = read_head(gguf)
    assert head.get("general.architecture") == "llama"
    assert head.get("general.name") == "tiny"
    assert head.get("general.file_type") == 0
    assert head.get("tokenizer.chat_template") == CHATML
    assert head.get("tokenizer.ggml.eos_token_id") == 2
    assert head.get("tokenizer.ggml.tokens")[:3] == ["<unk>", "<|im_start|>", "<|im_end|>"]
    assert head.get("no.such.key", "none") == "none"
    weights = load_file(model / "model.safetensors")
    assert head.parameters == sum(tensor.size for tensor in weights.values())
    (embeddings,) = (tensor for tensor in head.tensors if tensor.name == "token_embd.weight")
    start = head.data_start + embeddings.offset
    data = np.frombuffer(gguf.read_bytes()[start : start + embeddings.nbytes], np.float32)
    assert np.array_equal(data.reshape(320, 64), weights["model.embed_tokens.weight"])
    assert [path.name for path in gguf.parent.iterdir()] == ["tiny.gguf"]


def test_head_survives_a_round_trip_and_agrees_with_the_gguf_package(gguf: Path) -> None:
    from gguf import GGUFReader

    head = read_head(gguf)
    assert gguf.read_bytes()[: head.data_start] == head.encode()
    reader = GGUFReader(gguf)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert head.get(key) == field.contents(), key
    assert [(t.name, t.data_offset, t.tensor_type.name) for t in reader.tensors] == [
        (t.name, head.data_start + t.offset, t.type) for t in head.tensors
    ]


def test_the_folder_s_name_does_not_matter(gguf: Path, model: Path, tmp_path: Path, request: Any) -> None:
    other = Path(shutil.copytree(model, tmp_path / "Other-13B-Chat-v3"))
    converter.convert(other, tmp_path / "again.gguf", "f32", converter_cache(request.config), name="tiny")
    assert (tmp_path / "again.gguf").read_bytes() == gguf.read_bytes()


def test_llama_cpp_computes_what_torch_computes(gguf: Path, model: Path) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(str(model))("<|im_start|>user\nhello you\n中<|im_end|>").input_ids
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(gguf)
    parameters.n_ctx = 128
    server = xllamacpp.Server(parameters)
    # A sampled half of a character has no text, hence no entry: force a letter. The probabilities are the model's own.
    request = {"prompt": ids, "max_tokens": 1, "logprobs": 320, "n_probs": 320, "logit_bias": [[270, 1000]]}
    answer: Any = server.handle_completions(request)
    (position,) = answer["choices"][0]["logprobs"]["content"]
    theirs = {entry["id"]: entry["logprob"] for entry in position["top_logprobs"]}
    net: Any = AutoModelForCausalLM.from_pretrained(str(model))
    with torch.no_grad():
        ours = torch.log_softmax(net(torch.tensor([ids])).logits[0, -1], -1)
    assert len(theirs) == 320
    assert max(abs(ours[token].item() - value) for token, value in theirs.items()) < 1e-3


def test_unknown_architecture_and_tokenizer_are_named(model: Path, tmp_path: Path, request: Any) -> None:
    cache = converter_cache(request.config)
    strange = Path(shutil.copytree(model, tmp_path / "strange"))
    config = (strange / "config.json").read_text()
    (strange / "config.json").write_text(config.replace("LlamaForCausalLM", "StrangeForCausalLM"))
    with pytest.raises(StepFailed, match="architecture StrangeForCausalLM"):
        converter.convert(strange, tmp_path / "x.gguf", "f32", cache, name="x")
    assert not (tmp_path / "x.gguf").exists()


def test_failures_are_explained() -> None:
    explain = converter._explained
    output = "INFO: x\nchkhsh:  " + "ab" * 32 + "\nNotImplementedError: BPE pre-tokenizer was not recognized - update"
    assert "ab" * 32 in explain(output, 1, Path("model")).message
    other = explain("INFO: a\nTraceback\nValueError: Can not map tensor 'x'\n", 1, Path("model"))
    assert "ValueError: Can not map tensor 'x'" in other.message
    assert "signal 9" in explain("", -9, Path("model")).message


def test_where_the_converter_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    pinned = converter.converter_version()
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    with pytest.raises(StepFailed, match="LLAMA_CPP_DIR"):
        converter.converter_dir(tmp_path)
    monkeypatch.delenv("LLAMA_CPP_DIR")
    folder = converter.converter_dir(converter_cache(request.config))
    monkeypatch.setenv("LLAMA_CPP_DIR", str(folder))
    assert converter.converter_dir(tmp_path / "unused") == folder
    assert converter.converter_version() != pinned
    assert (folder / "LICENSE").is_file()


def test_natural_type_loses_nothing(model: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    assert converter.natural_type(model) == "f32"
    tensors = {key: value.astype("float16") for key, value in load_file(model / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert converter.natural_type(tmp_path) == "f16"
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"].astype("float32")}, tmp_path / "model.safetensors")
    assert converter.natural_type(tmp_path) == "f32"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04 not a model", "is not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 9) + bytes(16), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 5) + b"\x05", "damaged or cut short"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(StepFailed, match=words):
        read_head(tmp_path / "x.gguf")


def test_whatever_is_wrong_with_a_head_is_told(tmp_path: Path) -> None:
    """Every bit of a small one, each flipped alone: it is refused, or what it says can be read."""
    strings = struct.pack("<IQ", STRING, 2) + (struct.pack("<Q", 3) + b"abc") * 2
    raw = {
        "general.alignment": (UINT32, struct.pack("<I", 32)),
        "tokenizer.ggml.scores": (ARRAY, struct.pack("<IQ", 6, 2) + bytes(8)),
        "tokenizer.ggml.tokens": (ARRAY, strings),
    }
    tensors = (Tensor("a.weight", (32, 4), 0, 0), Tensor("b.weight", (32,), 0, 0))
    good = Head(3, raw, tensors, 0).with_tensors(["Q8_0", "F32"])
    content = good.encode() + bytes(good.data_size)
    (file := tmp_path / "x.gguf").write_bytes(content)
    read = 0
    with file.open("r+b", buffering=0) as data:
        for at, byte in enumerate(good.encode()):
            for bit in range(8):
                os.pwrite(data.fileno(), bytes([byte ^ 1 << bit]), at)
                with contextlib.suppress(StepFailed):
                    head = read_head(file)
                    assert len([head.get(key) for key in head.raw]) <= len(raw) and head.parameters >= 0
                    assert all(tensor.rows > 0 for tensor in head.tensors)
                    read += 1
            os.pwrite(data.fileno(), bytes([byte]), at)
    assert read_head(file).tensors == good.tensors and read > 500


def test_a_cut_file_is_noticed(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(gguf.read_bytes()[:-4096])
    with pytest.raises(StepFailed, match="cut short"):
        read_head(tmp_path / "cut.gguf")


def test_wheel_is_checked_by_digest_and_unpacked_whole(tmp_path: Path) -> None:
    import zipfile

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "some_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("inside/a.txt", "a")
        archive.writestr("inside/sub/b.txt", "b")
        archive.writestr("other.txt", "c")
    digest = digest_of_file(wheel)
    assert packaged.fetch_wheel("some-package==1.0", digest, tmp_path) == wheel  # put there by hand
    folder = packaged.unpack(wheel, ("inside/",), tmp_path / "out", strip="inside/")
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == ["a.txt", "sub", "sub/b.txt"]
    with pytest.raises(StepFailed, match="does not contain a file"):
        packaged.unpack(wheel, ("nothing/",), tmp_path / "none")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("evil/../../x.txt", "x")
    with pytest.raises(StepFailed, match="outside"):
        packaged.unpack(wheel, ("evil/",), tmp_path / "evil")
    assert not (tmp_path / "evil").exists()


def test_a_wheel_that_pip_cannot_get_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(StepFailed, match=r"cannot fetch some-package==1.0") as caught:
        packaged.fetch_wheel("some-package==1.0", "0" * 64, tmp_path)
    assert str(tmp_path / "wheels") in (caught.value.hint or "")
    assert list((tmp_path / "wheels").iterdir()) == []
