"""eval_metrics: scores of base and tuned model on rows that training never saw."""

from __future__ import annotations

from collections.abc import Mapping

import dagster as dg

from finetune_assets.assets.step_asset import StepAsset, table
from finetune_assets.evaluation.metrics import HEADLINES
from finetune_assets.evaluation.scored_row import SIDES
from finetune_assets.evaluation.summary import table as markdown
from finetune_assets.lineage.materialise import Step
from finetune_assets.store.artifact import Artifact, Made
from finetune_assets.worker.tasks.evaluate import Evaluate
from resources.gpu import POOL

CONTENT = ["metrics.json", "predictions.jsonl"]


def build(step: Step) -> Made:
    recipe, data = step.recipe, step.inputs["dataset_info"].path
    task = Evaluate(
        out=step.staging,
        model=recipe.model,
        base=step.inputs["base_model"].path,
        adapter=step.inputs["lora_adapter"].path,
        rows=data / "train.jsonl",
        test=data / "test.jsonl",
        train=recipe.train,
        evaluate=recipe.evaluate,
    )
    return Made(step.launch(task), content=CONTENT)


def describe(artifact: Artifact) -> Mapping[str, dg.MetadataValue]:
    metrics = artifact.metrics
    base, tuned = metrics["base"], metrics["tuned"]
    measured = [name for name in HEADLINES if base[name] is not None and tuned[name] is not None]
    return {
        "scores": table([{"measure": name, "base": base[name], "tuned": tuned[name]} for name in measured]),
        "scores by data set": dg.MetadataValue.md(markdown(dict(metrics))),
        **{f"tuned {name}": dg.MetadataValue.float(tuned[name]) for name in measured},
        "answers": table([_sample(sample) for sample in metrics["samples"]]),
        "compared": dg.MetadataValue.text(metrics["compared"]),
    }


def _sample(sample: Mapping) -> dict[str, str]:
    answers = {side: sample[side]["answer"] for side in SIDES}
    return {"asked": sample["messages"][-1]["content"], "expected": sample["label"], **answers}


EVAL_METRICS = StepAsset(
    name="eval_metrics",
    description=(
        "BLEU-4, ROUGE-1/2/L and perplexity of base and tuned model on the test split only, with the same questions, "
        "chat template and measures; and the answers of both. Measured in a separate process."
    ),
    kinds={"python"},
    pool=POOL,
    build=build,
    describe=describe,
)
