"""ollama_model: the model that `ollama run` serves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg

from finetune_assets.assets.step_asset import StepAsset, table
from finetune_assets.export.ollama.modelfile import modelfile
from finetune_assets.export.ollama.publish import OWN_STORE, publish, recorded
from finetune_assets.lineage.materialise import Step
from finetune_assets.store.artifact import Artifact, Made


def build(step: Step) -> Made:
    return Made(
        publish(
            step.recipe,
            step.inputs["gguf_file"],
            models=step.project.ollama_models,
            out=step.staging,
            before=step.previous.metrics if step.previous is not None else {},
            progress=step.progress,
        )
    )


def describe(artifact: Artifact) -> Mapping[str, dg.MetadataValue]:
    facts = artifact.metrics
    place = OWN_STORE if facts["where"] == "store" else facts["place"]
    return {
        "models": table([_row(name, facts) for name in facts["models"]]),
        "served from": dg.MetadataValue.text(f"{facts['where']} {place}"),
        "Modelfile": dg.MetadataValue.md(f"````\n{_of_the_moment(artifact)}````"),
        "prompts": dg.MetadataValue.text(facts["prompts"]) if "prompts" in facts else dg.MetadataValue.null(),
        "notes": dg.MetadataValue.md("\n".join(f"- {note}" for note in facts["notes"]) or "none"),
    }


def _of_the_moment(artifact: Artifact) -> str:
    """Return a Modelfile that works from any folder: FROM has the current path of the weights."""
    weights = artifact.path.parent.parent / "gguf_file" / artifact.inputs["gguf_file"]
    return modelfile(next(iter(recorded(artifact.metrics, weights).values())))


def _row(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    entry = facts["models"][name]
    row = {
        "name": name,
        "type": entry["type"],
        "digest": facts["digests"][name],
        "weights": f"sha256:{entry['sha256']}",
    }
    row["served by"] = facts.get("served", {}).get(name, {}).get("by", "no server yet: in the project's own store")
    return row | {"served before": facts["previous"][name] or "nothing"}


OLLAMA_MODEL = StepAsset(
    name="ollama_model",
    description=(
        "The GGUF file under its Ollama name, with a TEMPLATE derived from the chat template of the training, "
        "SYSTEM, stop tokens and num_ctx: on the server at OLLAMA_HOST if one answers, else in the project's own model "
        "store, which a server can be started with. Other types are called name:TYPE (ollama.types). On a server each "
        "model is checked under a staging tag before it takes over: weights, template, stop tokens, and an answer "
        "that agrees with llama.cpp's. Stale as soon as the server or store no longer has these digests."
    ),
    kinds={"ollama"},
    build=build,
    describe=describe,
)
