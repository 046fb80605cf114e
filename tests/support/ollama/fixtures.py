"""A tiny model that knows what it wants, and models to serve it as."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.export.gguf import converter
from finetune_assets.export.gguf.quantise import make_types
from finetune_assets.export.ollama.create import Made, create
from finetune_assets.export.ollama.expected_answer import Expected, expected
from finetune_assets.export.ollama.modelfile import OllamaModel
from finetune_assets.export.ollama.server.temporary import find_binary
from finetune_assets.export.ollama.template.derive import from_gguf
from finetune_assets.lineage.materialise import Step
from finetune_assets.store.artifact import Made as Produced
from tests.conftest import MiniProject
from tests.support.export_fixtures import converter_cache
from tests.support.history_fixtures import BODIES

needs_server = pytest.mark.skipif(find_binary() is None, reason="no Ollama here (PATH, OLLAMA_BIN)")
PARAMETERS = {"num_ctx": 256, "num_batch": 256, "num_thread": 1}


class Files:
    """GGUF files of one random model: f32 (29 MB), q8_0, and `other`, of other weights, in f32."""

    def __init__(self, tokenizer: Path, folder: Path, cache: Path):
        self.folder = folder
        self.f32, self.other = folder / "tiny-f32.gguf", folder / "other-f32.gguf"
        if not folder.exists():
            folder.mkdir()
            for seed, file in enumerate((self.f32, self.other)):
                base = folder / f"base-{seed}"
                _decisive(tokenizer, base, seed)
                converter.convert(base, file, "f32", cache, name="tiny")
            make_types(self.f32, ["q8_0"], folder, "tiny")
        self.q8_0 = folder / "tiny-q8_0.gguf"


def tiny_files(smollm2: Path, factory: pytest.TempPathFactory, config: pytest.Config) -> Files:
    """Made once in a test run."""
    return Files(smollm2, factory.getbasetemp() / "ollama-files", converter_cache(config))


def with_weights(mini: MiniProject, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the project's chain make files that an engine can run: of types f32 and q8_0."""

    def gguf_file(step: Step) -> Produced:
        types = {}
        for kind in step.recipe.gguf.types:
            types[kind] = {"file": f"mini-{kind}.gguf"}
            shutil.copyfile(getattr(files, kind), step.staging / f"mini-{kind}.gguf")
        (step.staging / "chat.json").write_text(json.dumps({"stop": ["<|im_end|>"]}))
        parts = {kind: [entry["file"], "chat.json"] for kind, entry in types.items()}
        return Produced({"types": types}, parts=parts)

    monkeypatch.setitem(BODIES, "gguf_file", gguf_file)


def served(gguf: Path, name: str = "tiny:latest", **changes: Any) -> OllamaModel:
    """A file as it would be served under a name."""
    given: dict[str, Any] = {"template": from_gguf(gguf).text, "system": None, "parameters": PARAMETERS}
    return OllamaModel(name, gguf, hashlib.sha256(gguf.read_bytes()).hexdigest(), **(given | changes))


def put(host: str, *models: OllamaModel, replies: dict[str, Expected] | None = None, **more: Any) -> dict[str, Made]:
    """Create models on a server."""
    return create(host, models, replies or {model.name: expected(model) for model in models}, **more)


def _decisive(tokenizer: Path, folder: Path, seed: int) -> None:
    """A random two-layer Llama whose logits are so far apart that rounding does not decide."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    words: Any = AutoTokenizer.from_pretrained(tokenizer)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(words), tie_word_embeddings=False, **shape, **heads, **ids)
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.norm.weight.mul_(400)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
