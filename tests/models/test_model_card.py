"""What a model says of itself: licence and languages go from the base to the GGUF file, names come from the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_assets.export.gguf import converter
from finetune_assets.export.merge.merge import merge
from finetune_assets.models.base_model import description
from finetune_assets.models.formats.gguf import read_head
from finetune_assets.models.formats.model_card import read_card, write_card
from finetune_assets.recipe import ModelSection
from tests.support.export_fixtures import converter_cache, tiny_adapter, tiny_base, tiny_tokenizer

pytestmark = pytest.mark.fast

CARD = """---
license: other
license_name: tiny-licence
license_link: https://example.com/licence
language: [en, no, zh]
tags: [text-generation]
base_model: somebody/else
---
# Tiny
"""


def test_from_the_base_s_card_to_the_file_s_metadata(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    base = tiny_base(tmp_path / "base", tied=True)
    tiny_tokenizer(base)
    (base / "README.md").write_text(CARD)
    merge(base, tiny_adapter(base, tmp_path / "adapter"), tmp_path / "merged", export_size=5, export_dtype="auto")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "merged" / name).write_bytes((base / name).read_bytes())
    about = {
        "general.base_models": [description(ModelSection(model_name_or_path="someone/Tiny-1"), tmp_path)],
        "general.datasets": [{"name": "identity"}, {"name": "facts"}],
    }
    file, cache = tmp_path / "tiny.gguf", converter_cache(request.config)
    converter.convert(tmp_path / "merged", file, "f32", cache, name="mine", about=about)
    head = read_head(file)
    assert {key: head.get(key) for key in head.raw if key.startswith("general.")} == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "mine",
        "general.basename": "mine",
        "general.size_label": head.get("general.size_label"),
        "general.license": "other",
        "general.license.name": "tiny-licence",
        "general.license.link": "https://example.com/licence",
        "general.languages": ["en", "no", "zh"],
        "general.base_model.count": 1,
        "general.base_model.0.name": "Tiny-1",
        "general.base_model.0.organization": "someone",
        "general.base_model.0.version": "main",
        "general.base_model.0.repo_url": "https://huggingface.co/someone/Tiny-1",
        "general.dataset.count": 2,
        "general.dataset.0.name": "identity",
        "general.dataset.1.name": "facts",
        "general.file_type": 0,
        "general.quantization_version": 2,
    }


@pytest.mark.parametrize(
    "text",
    ["", "# Tiny", "---\nlicense: mit\n", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: {a: b}\n---\n"],
)
def test_what_a_card_does_not_say_is_left_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_card(tmp_path) == {}
    out = tmp_path / "out"
    out.mkdir()
    write_card(out, read_card(tmp_path), "Nothing.")
    assert read_card(out) == {} and not list(out.iterdir())


def test_a_card_is_read_as_it_was_written(tmp_path: Path) -> None:
    facts = {"license": "apache-2.0", "language": ["en", "zh"]}
    write_card(tmp_path, {**facts, "license_link": None, "other": "x"}, "A model.")
    assert read_card(tmp_path) == facts
    assert (tmp_path / "README.md").read_text().endswith("---\n\nA model.\n")


def test_what_a_base_is_called(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    packaged = ModelSection(model_name_or_path="pypi:some-model==1.2/Some-1B.Q8_0.gguf", model_sha256="0" * 64)
    assert description(packaged, tmp_path) == {
        "name": "Some-1B.Q8_0",
        "repo_url": "https://pypi.org/project/some-model/1.2",
    }
    assert description(ModelSection(model_name_or_path="./base"), tmp_path) == {"name": "base"}, (
        "no path of this machine"
    )
