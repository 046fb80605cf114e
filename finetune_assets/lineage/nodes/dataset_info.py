"""dataset_info: the rows, cleaned and split."""

from __future__ import annotations

from collections.abc import Mapping

from finetune_assets.data.row_changes import split_change
from finetune_assets.lineage.cost import Cost, Known, at_most, ratio, seconds_of, times
from finetune_assets.lineage.node import Node, Upstream, metrics_named
from finetune_assets.lineage.nodes.raw_dataset import source_bytes, source_rows
from finetune_assets.store.artifact import Artifact


def _part_change(before: Artifact, after: Artifact, split: str) -> str | None:
    return split_change(*(artifact.path / f"{split}.jsonl" for artifact in (before, after)))


def _cost(node: Node, known: Known) -> Cost:
    past = known.past(node.name)
    if past is None:
        return Cost(None, source_bytes(known))  # the same text, laid out differently
    more = ratio(sum(known.of(split_rows).values()), sum(past.metrics["rows"].values()))
    return Cost(times(seconds_of(past, node.code_version), more), round(past.size * more))


def split_rows(known: Known) -> Mapping[str, int]:
    """Return the rows of each split, as they are or will be; empty if unknown."""
    data = known.plan["dataset_info"].artifact
    if data is None:
        section, counts = known.recipe.dataset, source_rows(known)
        if None not in counts:
            kept = sum(at_most(count or 0, section.max_samples) for count in counts)
            test, validation = (_held_out(size, kept) for size in (section.test_size, section.val_size))
            return {"train": max(kept - test - validation, 1), "validation": validation, "test": test}
        data = known.past("dataset_info")
    return data.metrics["rows"] if data is not None else {}


def _held_out(size: float, rows: int) -> int:
    return round(size if size >= 1 else size * rows)


# No tools: Python's own JSON and hashes, which are the same in every version.
NODE = Node(
    "dataset_info",
    # disable_shuffling: the order of rows matters only with it
    reads=(
        *("dataset.max_samples", "dataset.val_size", "dataset.test_size", "dataset.seed"),
        "train.disable_shuffling",
    ),
    upstreams=(Upstream("raw_dataset"),),
    part_change=_part_change,
    headline=metrics_named("rows.train", "rows.validation", "rows.test", "duplicates_dropped"),
    cost=_cost,
)
