"""Events that Dagster lacks: contents that changed outside, and assets that are up to date without a run.

Only the plan decides what is stale. Dagster decides by the last events of an asset and of its inputs, so these events
make its pages agree with the plan. They differ without them if an asset reads only a part of an upstream asset, if the
recipe returns to an earlier artifact, and if a published file is damaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import dagster as dg
from dagster import DagsterInstance, MetadataValue

from finetune_assets.assets.all_assets import STEPS
from finetune_assets.assets.checks import check_evaluations
from finetune_assets.assets.keys import (
    CODE_VERSION,
    DATA_VERSION,
    HOME,
    READ,
    Mount,
    asset_key,
    read_tags,
    source_versions,
    values_key,
)
from finetune_assets.assets.step_asset import StepAsset, page
from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.identity import shown
from finetune_assets.lineage.readings import Observed
from finetune_assets.store.artifact import Artifact

POINTER = "dagster/input_event_pointer/"  # to the event of an input; Dagster needs one for each version read

Tagged = dg.AssetObservation | dg.AssetMaterialization
Event = Tagged | dg.AssetCheckEvaluation


def pending_events(observed: Observed, instance: DagsterInstance, mount: Mount = HOME) -> list[Event]:
    """Return the events that bring Dagster up to date on a recipe; an empty list if it is."""
    events: list[Event] = []
    for event in observations(observed, mount):
        records = instance.fetch_observations(event.asset_key, limit=1).records
        if _differs(records[0].asset_observation if records else None, event.tags):
            events.append(event)
    for step in STEPS:
        artifact = observed.plan[step.name].artifact
        if artifact is None:
            continue
        event = _materialisation(step, artifact, observed, mount)
        record = instance.get_latest_materialization_event(event.asset_key)
        if _differs(record.asset_materialization if record else None, event.tags):
            events += [event, *check_evaluations(step.name, observed.recipe, artifact, event.asset_key)]
    return events


def confirmation(observed: Observed, mount: Mount = HOME) -> dg.AssetMaterialization | None:
    """Return the event that says once more that what is served is up to date: its freshness policy counts from it."""
    step, artifact = STEPS[-1], observed.plan[STEPS[-1].name].artifact
    return _materialisation(step, artifact, observed, mount) if artifact else None


def _materialisation(step: StepAsset, artifact: Artifact, observed: Observed, mount: Mount) -> dg.AssetMaterialization:
    return dg.AssetMaterialization(
        asset_key(observed.recipe, step.name, mount),
        metadata=page(step, artifact, observed.recipe, observed.project, reused=True),
        tags=_up_to_date_with(step.name, artifact, observed, mount),
    )


def observations(observed: Observed, mount: Mount = HOME) -> Iterator[dg.AssetObservation]:
    """Yield the version of everything that the recipe's assets read from outside the lineage."""
    for asset, reading in observed.readings.items():
        for key, version in source_versions(observed.recipe, asset, reading, mount).items():
            metadata = _values(observed, asset) if key == values_key(observed.recipe, asset, mount) else {}
            yield dg.AssetObservation(key, metadata=metadata, tags={DATA_VERSION: version})


def _up_to_date_with(asset: str, artifact: Artifact, observed: Observed, mount: Mount) -> dict[str, str]:
    """Return the tags of a materialisation that reuses this published artifact."""
    node = NODES[asset]
    used = {up.asset: observed.plan[up.asset].artifact for up in node.upstreams}
    upstreams = {name: upstream.data_version for name, upstream in used.items() if upstream is not None}
    read = read_tags(observed.recipe, asset, observed.readings[asset], upstreams, mount)
    return {
        CODE_VERSION: node.code_version,
        DATA_VERSION: artifact.data_version,
        "dagster/data_version_is_user_provided": "true",
        **{POINTER + name.removeprefix(READ): "NULL" for name in read},
        **read,
    }


def _values(observed: Observed, asset: str) -> dict[str, MetadataValue]:
    reading, item = observed.readings[asset], observed.plan[asset]
    values = {**reading.values["recipe"], **reading.values["tools"]}
    listing = "\n".join(f"{name}: {shown(value)}" for name, value in values.items())
    return {
        "values that differ from the defaults": MetadataValue.md(f"```yaml\n{listing}\n```" if listing else "none"),
        f"{asset} is": MetadataValue.text("; ".join([item.state, *item.reasons])),
    }


def _differs(last: Tagged | None, tags: Mapping[str, str] | None) -> bool:
    known = (last.tags if last else None) or {}
    return any(known.get(name) != value for name, value in (tags or {}).items() if not name.startswith(POINTER))
