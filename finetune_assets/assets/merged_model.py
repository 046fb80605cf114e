"""merged_model: base and adapter in one, in the base's own format."""

from __future__ import annotations

from collections.abc import Mapping

import dagster as dg

from finetune_assets.artifacts import Artifact, Made
from finetune_assets.assets.step_asset import StepAsset, figure
from finetune_assets.export.merge import merge
from finetune_assets.materialise import Step


def build(step: Step) -> Made:
    section = step.recipe.export
    return Made(
        merge(
            step.inputs["base_model"].path,
            step.inputs["lora_adapter"].path,
            step.staging,
            export_size=section.export_size,
            export_dtype=section.export_dtype,
            progress=step.progress,
        )
    )


def describe(artifact: Artifact) -> Mapping[str, dg.MetadataValue]:
    size = sum(record["size"] for name, record in artifact.manifest["files"].items() if name.endswith(".safetensors"))
    return {
        "weights (MB)": dg.MetadataValue.float(round(size / 1e6, 1)),
        **{key: figure(value) for key, value in artifact.metrics.items()},
        "serve it": dg.MetadataValue.md(f"```\nvllm serve {artifact.path}\n```"),
    }


MERGED_MODEL = StepAsset(
    name="merged_model",
    description=(
        "W + scale·BA for every adapted layer, streamed from shard to shard, always into the unquantised base that "
        "was trained on; with the tokenizer and the chat template that it was trained with."
    ),
    kinds={"huggingface", "pytorch"},
    build=build,
    describe=describe,
)
