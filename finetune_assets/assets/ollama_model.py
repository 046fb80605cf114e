"""ollama_model: what `ollama run` talks to."""

from __future__ import annotations

from collections.abc import Mapping

import dagster as dg

from finetune_assets.artifacts import Artifact, Made
from finetune_assets.assets.step_asset import StepAsset
from finetune_assets.export.serving import publish
from finetune_assets.materialise import Step


def build(step: Step) -> Made:
    recipe, gguf = step.recipe, step.inputs["gguf_file"]
    facts = publish(
        gguf.path / gguf.metrics["types"][recipe.served_type]["file"],
        gguf.path / "chat.json",
        recipe.ollama,
        system=recipe.system,
        models=step.project.ollama_models,
        out=step.staging,
        progress=step.progress,
    )
    return Made(facts)


def describe(artifact: Artifact) -> Mapping[str, dg.MetadataValue]:
    facts = artifact.metrics
    return {
        "name": dg.MetadataValue.text(facts["name"]),
        "digest": dg.MetadataValue.text(facts["digest"]),
        "served from": dg.MetadataValue.text(f"{facts['where']} {facts['place']}"),
        "talk to it": dg.MetadataValue.md("\n".join(["```", *facts["commands"], "```"])),
        "Modelfile": dg.MetadataValue.md(f"````\n{facts['modelfile']}````"),
        "notes": dg.MetadataValue.md("\n".join(f"- {note}" for note in facts["notes"]) or "none"),
    }


OLLAMA_MODEL = StepAsset(
    name="ollama_model",
    description=(
        "The GGUF file under its Ollama name, with a TEMPLATE derived from the chat template that it was trained "
        "with, SYSTEM, stop tokens and num_ctx: on the server at OLLAMA_HOST if one answers, else in a model store of "
        "our own that a server can be started with. Stale as soon as that place no longer serves this digest."
    ),
    kinds={"ollama"},
    build=build,
    describe=describe,
)
