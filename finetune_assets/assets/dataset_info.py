"""dataset_info: registered, validated and split conversations."""

from __future__ import annotations

from collections.abc import Mapping

import dagster as dg

from finetune_assets.assets.step_asset import StepAsset, table
from finetune_assets.data.prepare import SPLITS, prepare
from finetune_assets.lineage.materialise import Step
from finetune_assets.store.artifact import Artifact, Made


def build(step: Step) -> Made:
    facts = prepare(
        step.inputs["raw_dataset"].path,
        step.recipe.dataset,
        step.staging,
        keep_order=step.recipe.train.disable_shuffling,
    )
    files = {name: [f"{name}.jsonl"] for name in SPLITS}
    return Made(facts, parts=files, content=[file for names in files.values() for file in names])


def describe(artifact: Artifact) -> Mapping[str, dg.MetadataValue]:
    facts = artifact.metrics
    return {
        "rows": table([{"data set": name, **counts} for name, counts in facts["by_dataset"].items()]),
        **{f"{name} rows": dg.MetadataValue.int(facts["rows"][name]) for name in SPLITS},
        "duplicates dropped": dg.MetadataValue.int(facts["duplicates_dropped"]),
        "dagster/row_count": dg.MetadataValue.int(sum(facts["rows"].values())),
        "samples": table(
            [
                {"sample": number, **message}
                for number, messages in enumerate(facts["samples"], 1)
                for message in messages
            ]
        ),
    }


COLUMNS = dg.TableSchema(
    [
        dg.TableColumn("id", "string", "digest of the messages"),
        dg.TableColumn("dataset", "string", "the data set that the row comes from"),
        dg.TableColumn("messages", "list[{role, content}]", "the conversation; it ends with the answer to learn"),
    ]
)
DATASET_INFO = StepAsset(
    name="dataset_info",
    description=(
        "Every row parsed and checked, exact duplicates dropped, then split by content into train, validation and "
        "test. Rows that ask the same question stay in one split. Its data version depends on the conversations "
        "only: re-formatted or reordered source files change nothing downstream."
    ),
    kinds={"json"},
    build=build,
    describe=describe,
    columns=COLUMNS,
)
