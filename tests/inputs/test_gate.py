"""The guard that keeps libraries from running a model's own code, and its messages."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from finetune_assets.chat.tokenizer import load_tokenizer
from finetune_assets.inputs import remote_code
from finetune_assets.models.loading import load_network
from finetune_assets.reporting.errors import StepFailed
from tests.support.hostile.own_code import SECRET, hostile, modules_folder, write_json
from tests.support.training_fixtures import tiny_base

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    modules_folder(tmp_path / "modules", monkeypatch)


def test_code_runs_only_inside_a_gate_that_trusts_it(tmp_path: Path) -> None:
    with remote_code.gate(trust=False):
        pass
    dynamic = importlib.import_module("transformers.dynamic_module_utils")
    marker = tmp_path / "ran"
    hostile(tmp_path / "evil.py", marker)
    # whoever had the function before the guard, and whoever imports it afterwards, has the guarded one
    by_name = importlib.import_module("transformers.models.auto.tokenization_auto").get_class_from_dynamic_module
    assert by_name is dynamic.get_class_from_dynamic_module
    with pytest.raises(remote_code.CodeRefused):
        by_name("evil.Tok", str(tmp_path))
    with remote_code.gate(trust=False), pytest.raises(remote_code.CodeRefused):
        by_name("evil.Tok", str(tmp_path))
    for name in ("get_cached_module_file", "get_class_in_module"):
        with pytest.raises(remote_code.CodeRefused):
            getattr(dynamic, name)("evil.py", str(tmp_path))
    assert not marker.exists()
    with remote_code.gate(trust=True):
        assert dynamic.get_class_from_dynamic_module("evil.Tok", str(tmp_path)).__name__ == "Tok"
    assert marker.read_text() == SECRET
    with pytest.raises(remote_code.CodeRefused):
        dynamic.get_class_from_dynamic_module("evil.Tok", str(tmp_path))


def test_a_gate_inside_a_gate(tmp_path: Path) -> None:
    dynamic = importlib.import_module("transformers.dynamic_module_utils")
    hostile(tmp_path / "evil.py", tmp_path / "ran")
    with remote_code.gate(trust=True):
        with remote_code.gate(trust=False), pytest.raises(remote_code.CodeRefused):
            dynamic.get_class_from_dynamic_module("evil.Tok", str(tmp_path))
        assert dynamic.get_class_from_dynamic_module("evil.Tok", str(tmp_path)).__name__ == "Tok"


def test_a_transformers_that_imports_code_by_other_functions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dynamic = importlib.import_module("transformers.dynamic_module_utils")
    monkeypatch.delattr(dynamic, "get_class_in_module")
    monkeypatch.setattr(remote_code._Gate, "guarded", False)
    words = r"cannot make sure .* transformers .* has no get_class_in_module"
    with pytest.raises(StepFailed, match=words), remote_code.gate(trust=False):
        pytest.fail("the gate is open")


def test_a_kernel_of_a_hub_is_not_downloaded(tmp_path: Path) -> None:
    import torch

    base = tiny_base(tmp_path / "base")
    write_json(base / "config.json", {"attn_implementation": "someone/kernel"})
    with pytest.raises(StepFailed, match=r"the model .*kernel"):
        load_network(base, torch.float32)
    kernels = importlib.import_module("transformers.integrations.hub_kernels")
    with pytest.raises(remote_code.CodeRefused, match="get_kernel of someone/kernel"):
        kernels.get_kernel("someone/kernel")


@pytest.mark.parametrize("named", ["AutoTokenizer", "AutoModelForCausalLM"])
def test_a_name_that_is_no_tokenizer_class(named: str, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    write_json(base / "tokenizer_config.json", {"tokenizer_class": named})
    with pytest.raises(StepFailed, match=r"tokenizer_class of tokenizer_config\.json is not a tokenizer class"):
        load_tokenizer(base)


def test_classes_that_the_files_name(tmp_path: Path) -> None:
    write_json(
        tmp_path / "config.json", {"text_config": [{"auto_map": {"AutoModel": "a.B"}}], "auto_map": {"X": "c.D\x1b[2J"}}
    )
    write_json(tmp_path / "tokenizer_config.json", {"auto_map": ["e.F\x1b[2J", None]})
    (tmp_path / "generation_config.json").write_text("[" * 100_000)
    (tmp_path / "processor_config.json").write_text("{")
    assert remote_code.asked_for(tmp_path) == [
        "config.json: X: c.D?[2J",
        "config.json: AutoModel: a.B",
        "tokenizer_config.json: ['e.F\\x1b[2J', None]",
    ]
    assert remote_code.asked_for(tmp_path, "processor_config.json", "nowhere.json") == []


@pytest.mark.parametrize(
    "name", ["a.py", "LICENSE.PY", "x.cpython-311-x86_64-linux-gnu.so", "b.pyc", "site.pth", "c.DLL"]
)
def test_file_names_that_python_imports(name: str) -> None:
    from fnmatch import fnmatchcase

    assert remote_code.is_code(name) and any(fnmatchcase(name, pattern) for pattern in remote_code.CODE_PATTERNS)
    assert not remote_code.is_code("LICENSE") and not remote_code.is_code("tokenizer.json")
