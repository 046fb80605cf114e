"""ollama_model: what `ollama run` talks to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg

from finetune_assets.artifacts import Artifact, Made
from finetune_assets.assets.step_asset import StepAsset, table
from finetune_assets.export.serving import publish
from finetune_assets.materialise import Step


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
    return {
        "models": table([_row(name, facts) for name in facts["models"]]),
        "served from": dg.MetadataValue.text(f"{facts['where']} {facts['place']}"),
        "Modelfile": dg.MetadataValue.md(f"````\n{facts['modelfile']}````"),
        "notes": dg.MetadataValue.md("\n".join(f"- {note}" for note in facts["notes"]) or "none"),
    }


def _row(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    entry = facts["models"][name]
    row = {
        "name": name,
        "type": entry["type"],
        "digest": facts["digests"][name],
        "weights": f"sha256:{entry['sha256']}",
    }
    return row | {"served before": facts["previous"][name] or "nothing"}


OLLAMA_MODEL = StepAsset(
    name="ollama_model",
    description=(
        "The GGUF file under its Ollama name, with a TEMPLATE derived from the chat template that it was trained "
        "with, SYSTEM, stop tokens and num_ctx: on the server at OLLAMA_HOST if one answers, else in a model store of "
        "our own that a server can be started with. Other types go to name:TYPE (ollama.types). On a server each is "
        "checked under a staging tag before it takes over: weights, template, stop tokens, and an answer that agrees "
        "with llama.cpp's. Stale as soon as that place no longer serves these digests."
    ),
    kinds={"ollama"},
    build=build,
    describe=describe,
)
