"""Models that bring code: hostile ones, whose code leaves a marker when it runs, and an honest one."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.models.test_base_model import safetensors
from tests.support.training_fixtures import tiny_base

SECRET = "hf_very_secret"
NEEDED = "this model needs its own code: model.trust_remote_code"

HOSTILE = """
import os
from pathlib import Path
Path({marker!r}).write_text(os.environ.get("HF_TOKEN", "ran"))
class Tok: pass
"""
SHAPE = {
    "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
# What llama.cpp's converter reads with AutoTokenizer.from_pretrained(..., trust_remote_code=True).
CONVERTED: dict[str, dict[str, Any]] = {
    "HunYuan": {
        "architectures": ["HunYuanMoEV1ForCausalLM"], "model_type": "hunyuan_v1_moe", "num_experts": 2,
        "moe_topk": [1, 1], "moe_intermediate_size": [96, 96], "num_shared_expert": [1, 1],
    },
    "Qwen 1": {"architectures": ["QWenLMHeadModel"], "model_type": "qwen"},
    "DeepSeek": {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"},
    "GLM": {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4"},
    "ChatGLM": {"architectures": ["ChatGLMModel"], "model_type": "chatglm"},
    "Dream": {"architectures": ["DreamModel"], "model_type": "Dream"},
    "LLaDA": {"architectures": ["LLaDAModelLM"], "model_type": "llada"},
    "MiniMax": {"architectures": ["MiniMaxText01ForCausalLM"], "model_type": "minimax_text_01"},
}  # fmt: skip


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Set keys of a JSON file, which need not exist."""
    there = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**there, **content}), encoding="utf-8")


def modules_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have transformers copy code to `folder` in this test, in this process and in its children."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(folder))
    dynamic = importlib.import_module("transformers.dynamic_module_utils")
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(folder))  # it has read the variable already
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)


def hostile(file: Path, marker: Path) -> Path:
    """A Python file that writes `marker` when it is imported."""
    file.write_text(HOSTILE.format(marker=str(marker)), encoding="utf-8")
    return file


def to_convert(folder: Path, kind: str, reference: str) -> Path:
    """A model of the shape `kind` whose tokenizer is the class `reference`; of weights it has next to none."""
    folder.mkdir()
    write_json(folder / "config.json", SHAPE | CONVERTED[kind])
    names = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [reference, None]}}
    write_json(folder / "tokenizer_config.json", names)
    write_json(folder / "tokenizer.json", {})
    (folder / "model.safetensors").write_bytes(safetensors(b"w"))
    return folder


def naming_code(folder: Path, reference: str, *, model_type: str = "llama") -> Path:
    """A tiny Llama whose configuration and model are the class `reference`, which transformers need not load."""
    tiny_base(folder)
    auto_map = {"AutoConfig": reference, "AutoModelForCausalLM": reference}
    write_json(folder / "config.json", {"auto_map": auto_map, "model_type": model_type})
    return folder


def with_its_own_code(folder: Path) -> Path:
    """A tiny Llama under a name of its own, whose configuration, model and tokenizer are classes in its folder."""
    tiny_base(folder)
    (folder / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    (folder / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    write_json(folder / "config.json", {"auto_map": auto_map, "model_type": "own", "architectures": ["OwnForCausalLM"]})
    names = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}
    write_json(folder / "tokenizer_config.json", names)
    return folder
