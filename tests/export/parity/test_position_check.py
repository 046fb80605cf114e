"""Rope and context of files whose architectures have ways of their own: what is right in them is no fault."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.export.parity.checks.positions import check_positions
from finetune_assets.export.parity.checks.structure import check_head
from finetune_assets.models.formats.gguf import STRING, UINT32, Head

pytestmark = pytest.mark.fast

NOWHERE = Path("none.gguf")  # not read: these files have no tensors


def head(architecture: str, *, context: int, base: float | None = None) -> Head:
    empty = Head(3, {}, (), 0).with_value("general.architecture", STRING, architecture)
    named = empty.with_value(f"{architecture}.context_length", UINT32, context)
    base_value = {} if base is None else {f"{architecture}.rope.freq_base": (6, struct.pack("<f", base))}
    return Head(3, named.raw | base_value, (), 0)


def config(**settings: Any) -> Any:
    from transformers import PreTrainedConfig

    made = PreTrainedConfig()
    for key, value in settings.items():
        setattr(made, key, value)
    return made


def found(*of: Any) -> list[str]:
    file, settings = of
    return [str(failure) for failure in check_positions(file, NOWHERE, settings)]


def test_a_file_may_allow_for_a_longer_context() -> None:
    """So the converter writes Granite 4's hybrids (2^20) and Hunyuan's models (2^18)."""
    short = config(max_position_embeddings=131_072)
    assert found(head("granitehybrid", context=2**20), short) == []
    assert found(head("granitehybrid", context=2048), short) == ["context length: 2048, allowed: 131072"]
    assert found(head("llama", context=2**20), short) == ["context length: 1048576, allowed: 131072"]


def test_a_base_that_is_stretched() -> None:
    """Hunyuan's files hold what base and alpha come to."""
    rope: dict[str, Any] = {"rope_type": "dynamic", "alpha": 1000.0, "rope_theta": 10_000.0}
    stretched = head("hunyuan-dense", context=32_768, base=11_158_840.0)
    assert found(stretched, config(rope_parameters=rope)) == []
    named = found(stretched, config(rope_parameters=rope | {"rope_type": "default"}))
    assert named == ["rope base: rope.freq_base 1.11588e+07, allowed: 10000"]


def test_the_older_spelling_of_a_configuration() -> None:
    scaled = config(rope_theta=5e4, rope_scaling={"type": "linear", "factor": 4.0})
    file = head("llama", context=512, base=5e4)
    factor = {"llama.rope.scaling.factor": (6, struct.pack("<f", 4.0))}
    assert found(Head(3, file.raw | factor, (), 0), scaled) == []
    assert found(file, scaled) == ["rope scaling: none, allowed: linear by 4"]


def test_an_architecture_that_the_gguf_package_has_not(tmp_path: Path) -> None:
    """A llama.cpp of one's own (LLAMA_CPP_DIR) may know more than the package; what runs it decides."""
    settings = {"template": "{{ x }}", "stop_token_ids": []}
    file = head("brand-new", context=512).with_value("tokenizer.chat_template", STRING, "{{ x }}")

    class Words:
        eos_token_id = None

    words: Any = Words()
    assert check_head(file, tmp_path, config(), settings, words) == []
