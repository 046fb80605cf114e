"""merged_model: base model and adapter merged into one model, in the format of the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg

from finetune_assets.assets.step_asset import StepAsset, figure, table
from finetune_assets.lineage.materialise import Step
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.store.artifact import Artifact, Made
from finetune_assets.worker.tasks.merge import Merge
from resources.gpu import POOL


def build(step: Step) -> Made:
    adapter, base = step.inputs["lora_adapter"], step.inputs["base_model"]
    if adapter.manifest["ingredients"]["upstreams"]["base_model"] != base.data_version:
        raise StepFailed(
            f"{step.recipe.name}/lora_adapter {adapter.fingerprint} was trained on a different base model than "
            f"{base.fingerprint}, which the recipe names",
            f"materialise {step.recipe.name}/lora_adapter first",
        )
    task = Merge(
        out=step.staging,
        model=step.recipe.model,
        base=base.path,
        adapter=adapter.path,
        held_out=step.inputs["dataset_info"].path / "test.jsonl",
        export=step.recipe.export,
    )
    return Made(step.launch(task))


def describe(artifact: Artifact) -> Mapping[str, dg.MetadataValue]:
    size = sum(record["size"] for name, record in artifact.manifest["files"].items() if name.endswith(".safetensors"))
    facts = dict(artifact.metrics)
    check = facts.pop("check", None)
    return {
        "weights (MB)": dg.MetadataValue.float(round(size / 1e6, 1)),
        **({"merged model compared with base + adapter": table([_row(check)])} if check else {}),
        **{key: figure(value) for key, value in facts.items()},
    }


def _row(check: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "distance of the logits": check["difference"],
        "limit": check["allowed"],
        "what the adapter changes": check["effect"],
        "as KL (nats per token)": check["kl_from_base"],
        "positions compared": check["places"],
        "weight tensors compared": check["weights_compared"],
        "computed in": check["precision"],
        "on": check["device"],
    }


MERGED_MODEL = StepAsset(
    name="merged_model",
    description=(
        "W + scale·BA for every adapted layer, streamed from shard to shard, always into the unquantised base model of "
        "the training; with the tokenizer and the chat template of the training. Published only if its outputs on "
        "held-out rows agree with those of base and adapter together, within the rounding error of its weights."
    ),
    kinds={"huggingface", "pytorch"},
    pool=POOL,
    build=build,
    describe=describe,
)
