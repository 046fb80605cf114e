"""A model store written without a server: Ollama's layout and bytes, whole or not there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.export.ollama import model_store as ollama_store
from finetune_assets.export.ollama.model_store import manifest_path, read, write
from finetune_assets.export.ollama.modelfile import OllamaModel
from finetune_assets.models.formats.gguf import UINT32, read_head, write_with_head
from finetune_assets.reporting.errors import BadInput, StepFailed

pytestmark = pytest.mark.fast


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    import gguf
    import numpy as np

    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(7)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model(gguf: Path, name: str = "demo:latest", **changes: Any) -> OllamaModel:
    given: dict[str, Any] = {
        "sha256": hashlib.sha256(gguf.read_bytes()).hexdigest(),
        "template": "{{ .Prompt }}",
        "system": "A & B <c> 好\u2028",
        "parameters": {"temperature": 1.0, "stop": ["<|im_end|>"], "num_ctx": 64, "top_p": 0.9},
        "licenses": ["first", "second"],
    }
    return OllamaModel(name, gguf, **(given | changes))


def publish(models: Path, gguf: Path, **changes: Any) -> ollama_store.Published:
    (made,) = write(models, [model(gguf, **changes)]).values()
    return made


def test_layout_and_bytes(tmp_path: Path, gguf: Path) -> None:
    models = tmp_path / "models"
    made = publish(models, gguf)
    place = models / "manifests/registry.ollama.ai/library/demo/latest"
    manifest = json.loads(place.read_bytes())
    assert place.read_bytes().endswith(b"}\n")
    assert made.digest == hashlib.sha256(place.read_bytes()).hexdigest() == read(models, "demo:latest")
    assert [layer.kind for layer in made.layers] == ["model", "template", "system", "license", "license", "params"]
    blobs = {path.name for path in (models / "blobs").iterdir()}
    assert blobs == {layer.digest.replace(":", "-") for layer in made.layers} | {
        manifest["config"]["digest"].replace(":", "-")
    }
    for blob in (models / "blobs").iterdir():
        assert blob.name == f"sha256-{hashlib.sha256(blob.read_bytes()).hexdigest()}"
    weights, _, system, *_, params = (models / "blobs" / layer.digest.replace(":", "-") for layer in made.layers)
    assert weights.samefile(gguf)
    assert system.read_text() == "A & B <c> 好\u2028"
    assert params.read_text() == '{"num_ctx":64,"stop":["\\u003c|im_end|\\u003e"],"temperature":1,"top_p":0.9}\n'
    config = json.loads((models / "blobs" / manifest["config"]["digest"].replace(":", "-")).read_bytes())
    assert (config["model_family"], config["model_type"], config["file_type"]) == ("llama", "256", "Q8_0")


def test_again_is_the_same_and_another_prompt_another_model(tmp_path: Path, gguf: Path) -> None:
    models = tmp_path / "models"
    first = publish(models, gguf)
    assert publish(models, gguf) == first
    assert publish(tmp_path / "elsewhere", gguf).digest == first.digest
    other = publish(models, gguf, system=None, parameters={})
    assert other.digest != first.digest
    assert [layer.kind for layer in other.layers] == ["model", "template", "license", "license"]
    assert read(models, "demo:latest") == other.digest


def test_a_store_with_holes_is_not_read_and_is_mended(tmp_path: Path, gguf: Path) -> None:
    models = tmp_path / "models"
    assert read(models, "demo:latest") is None
    made = publish(models, gguf)
    template = models / "blobs" / made.layers[1].digest.replace(":", "-")
    template.write_text("cut")
    assert read(models, "demo:latest") is None
    assert publish(models, gguf) == made
    assert read(models, "demo:latest") == made.digest
    template.unlink()
    assert read(models, "demo:latest") is None
    manifest_path(models, "demo").write_text("{")
    assert read(models, "demo:latest") is None


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr("os.link", refuse)


@pytest.mark.usefixtures("no_links")
def test_copies_where_links_cannot_be_made(tmp_path: Path, gguf: Path) -> None:
    made = publish(tmp_path / "models", gguf)
    weights = tmp_path / "models/blobs" / made.layers[0].digest.replace(":", "-")
    assert weights.read_bytes() == gguf.read_bytes() and not weights.samefile(gguf)
    assert not list((tmp_path / "models/blobs").glob("partial-*"))


@pytest.mark.usefixtures("no_links")
def test_blobs_of_another_content_are_mended(tmp_path: Path, gguf: Path) -> None:
    """A flipped bit changes no size."""
    models = tmp_path / "models"
    made = publish(models, gguf)
    blobs = [ollama_store.blob_path(models, layer.digest) for layer in made.layers]
    whole = [blob.read_bytes() for blob in blobs]
    for blob in blobs:
        blob.write_bytes(bytes([blob.read_bytes()[0] ^ 1]) + blob.read_bytes()[1:])
    assert publish(models, gguf) == made
    assert [blob.read_bytes() for blob in blobs] == whole


@pytest.mark.usefixtures("no_links")
def test_a_copy_is_checked_on_the_way(tmp_path: Path, gguf: Path) -> None:
    with pytest.raises(StepFailed, match=r"model\.gguf has changed since it was published"):
        publish(tmp_path / "models", gguf, sha256="0" * 64)
    assert not [path for path in (tmp_path / "models").rglob("*") if path.is_file()]


def test_several_models_share_their_blobs(tmp_path: Path, gguf: Path) -> None:
    models = tmp_path / "models"
    made = write(models, [model(gguf), model(gguf, "demo:q8_0"), model(gguf, "demo:other", system="another")])
    assert list(made) == ["demo:latest", "demo:q8_0", "demo:other"]
    assert made["demo:latest"].digest == made["demo:q8_0"].digest != made["demo:other"].digest
    assert {read(models, name) for name in made} == {one.digest for one in made.values()}
    assert not ollama_store.unreferenced(models)
    ollama_store.remove(models, "demo:other")
    ollama_store.remove(models, "demo:other")
    assert read(models, "demo:other") is None and read(models, "demo:latest") == made["demo:latest"].digest
    assert len(ollama_store.unreferenced(models)) == 1, "its system message; the configuration is the others', too"


def test_no_name_moves_before_all_blobs_are_there(tmp_path: Path, gguf: Path) -> None:
    models = tmp_path / "models"
    before = publish(models, gguf)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    with pytest.raises(StepFailed, match="is not a GGUF file"):
        write(models, [model(gguf, system="new"), model(broken, "demo:q8_0")])
    assert read(models, "demo:latest") == before.digest


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("demo", "registry.ollama.ai/library/demo/latest"),
        ("me/demo:v2", "registry.ollama.ai/me/demo/v2"),
        ("host.example/me/demo", "host.example/me/demo/latest"),
    ],
)
def test_names(name: str, place: str) -> None:
    assert manifest_path(Path("m"), name) == Path("m/manifests") / place


@pytest.mark.parametrize("name", ["", "../x", "a/b/c/d", "a b", "x:", ".hidden", "a//b", "x:../y"])
def test_names_that_are_none(name: str) -> None:
    if name == "x:":
        assert manifest_path(Path("m"), name).name == "latest"
        return
    with pytest.raises(BadInput):
        manifest_path(Path("m"), name)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (256, "256"),
        (30_000, "30K"),
        (134_515_008, "134.52M"),
        (7_000_000, "7M"),
        (8_030_261_248, "8.0B"),
        (10**9, "1B"),
    ],
)
def test_numbers_as_ollama_writes_them(count: int, text: str) -> None:
    assert ollama_store.human_number(count) == text


def test_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"something else")
    with pytest.raises(StepFailed, match="is not a GGUF file"):
        publish(tmp_path / "models", tmp_path / "x.gguf")
    assert read(tmp_path / "models", "demo") is None


@pytest.mark.parametrize(("number", "name"), [(0, "F32"), (32, "BF16"), (15, "Q4_K_M"), (10, "Q2_K"), (99, "unknown")])
def test_file_types_as_ollama_names_them(tmp_path: Path, gguf: Path, number: int, name: str) -> None:
    typed = tmp_path / "typed.gguf"
    write_with_head(gguf, read_head(gguf).with_value("general.file_type", UINT32, number), typed)
    publish(tmp_path / "models", typed)
    manifest = json.loads(manifest_path(tmp_path / "models", "demo").read_bytes())
    config = tmp_path / "models/blobs" / manifest["config"]["digest"].replace(":", "-")
    assert json.loads(config.read_bytes())["file_type"] == name
