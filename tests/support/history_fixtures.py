"""A whole chain without a model: the real plan, store, data room and Ollama store; stand-ins for what computes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from finetune_assets.assets.dataset_info import DATASET_INFO
from finetune_assets.assets.ollama_model import OLLAMA_MODEL
from finetune_assets.assets.raw_dataset import RAW_DATASET
from finetune_assets.lineage.graph import NODES, upstream_of
from finetune_assets.lineage.materialise import Step, materialise
from finetune_assets.lineage.plan import make_plan, open_store
from finetune_assets.lineage.planned import Planned
from finetune_assets.recipe.file import load_recipe
from finetune_assets.store.artifact import Artifact, Made
from finetune_assets.store.artifact_store import ArtifactStore
from tests.conftest import MiniProject
from tests.support.export_fixtures import CHATML
from tests.support.ollama.template_files import add_letters


def stand_in(step: Step) -> Made:
    """A file that depends on the inputs and on the values that are read."""
    inputs = {name: artifact.data_version for name, artifact in step.inputs.items()}
    content = {"inputs": inputs, "recipe": step.ingredients["recipe"]}
    (step.staging / "weights.json").write_text(json.dumps(content, sort_keys=True))
    return Made({"device": "a stand-in", "precision": "fp32", "final_loss": 0.5, "rows": 10})


def tiny_gguf(path: Path, seed: str) -> None:
    """A GGUF file with a chat template and a tokenizer of bytes, and weights that no engine would run."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(0)
    add_letters(writer, CHATML, ["<unk>", "<|im_start|>", "<|im_end|>"])
    digest = hashlib.sha256(seed.encode()).digest()
    writer.add_tensor("token_embd.weight", np.frombuffer(digest, np.uint8).astype(np.float32).reshape(1, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_file(step: Step) -> Made:
    types = {}
    for kind in step.recipe.gguf.types:
        name = f"{step.recipe.name}-{kind}.gguf"
        tiny_gguf(step.staging / name, kind + step.inputs["merged_model"].data_version)
        types[kind] = {"file": name, "bytes": (step.staging / name).stat().st_size}
    (step.staging / "chat.json").write_text(json.dumps({"stop": ["<|im_end|>"]}))
    return Made({"types": types}, parts={kind: [entry["file"], "chat.json"] for kind, entry in types.items()})


BODIES: dict[str, Callable[[Step], Made]] = {
    **dict.fromkeys(NODES, stand_in),
    "raw_dataset": RAW_DATASET.build,
    "dataset_info": DATASET_INFO.build,
    "gguf_file": gguf_file,
    "ollama_model": OLLAMA_MODEL.build,
}


def make_chain(mini: MiniProject, name: str = "mini", *, upto: str = "ollama_model") -> dict[str, Artifact]:
    """Bring a recipe's assets up to date, as far as the one named."""
    mini.empty_base()
    recipe = load_recipe(mini.recipe_path(name))
    return {
        asset: materialise(asset, recipe, mini, body, lambda event: None).artifact
        for asset, body in BODIES.items()
        if asset in upstream_of({upto}) or upto == "ollama_model"
    }


def store_of(mini: MiniProject) -> ArtifactStore:
    return open_store(mini)


def plan_of(mini: MiniProject, name: str = "mini") -> dict[str, Planned]:
    return make_plan(load_recipe(mini.recipe_path(name)), mini, open_store(mini))
