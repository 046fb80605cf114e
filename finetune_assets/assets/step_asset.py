"""One step of a lineage as a Dagster asset: run or reuse it, report its data version and its metadata."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg

from finetune_assets.artifacts import Artifact, Made
from finetune_assets.errors import FinetuneError
from finetune_assets.lineage import NODES
from finetune_assets.materialise import Progress, Step, materialise
from finetune_assets.project import Project
from finetune_assets.recipe import Recipe
from finetune_assets.watching import tell

FORCE_TAG = "finetune/force"
LOG_EVERY = 10.0  # seconds between two progress lines in Dagster's log


@dataclass(frozen=True)
class StepAsset:
    """What distinguishes one asset from another.

    Args:
        build: makes the artifact in `step.staging`; calls into one ML room.
        describe: the artifact's metadata for the asset page.
    """

    name: str
    description: str
    kinds: set[str]
    build: Callable[[Step], Made]
    describe: Callable[[Artifact], Mapping[str, dg.MetadataValue]]


def asset_key(recipe: Recipe, name: str) -> dg.AssetKey:
    return dg.AssetKey([recipe.name, name])


def define(spec: StepAsset, recipe: Recipe, project: Project) -> dg.AssetsDefinition:
    """The Dagster asset `<recipe>/<name>`."""
    node = NODES[spec.name]

    @dg.asset(
        key=asset_key(recipe, spec.name),
        deps=[asset_key(recipe, up.asset) for up in node.upstreams],
        group_name=recipe.name,
        description=spec.description,
        kinds=spec.kinds,
        owners=["team:fine-tuning"],
        code_version=node.code_version,
        required_resource_keys={"gpu"},
    )
    def step(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        tell(spec.name, {"event": "begin"})
        gpu = context.resources.gpu
        try:
            outcome = materialise(
                spec.name,
                recipe,
                project,
                spec.build,
                _reporter(spec.name, context.log.info),
                choose_device=gpu.choose,
                force=context.run.tags.get(FORCE_TAG) == "true",
            )
        except FinetuneError as error:
            # Dagster shows a Failure's description instead of a traceback
            raise dg.Failure(description=str(error), allow_retries=False) from error
        artifact = outcome.artifact
        tell(spec.name, {"event": "done", "reused": outcome.reused, "artifact": artifact})
        return dg.MaterializeResult(
            data_version=dg.DataVersion(artifact.data_version),
            metadata={
                **spec.describe(artifact),
                "artifact": dg.MetadataValue.path(artifact.path),
                "fingerprint": artifact.fingerprint,
                "seconds to build": float(artifact.manifest["seconds"]),
                "already published": outcome.reused,
            },
        )

    return step


def table(rows: Sequence[Mapping[str, Any]]) -> dg.MetadataValue:
    """A metadata table; columns are the keys of the first row."""
    return dg.MetadataValue.table([dg.TableRecord(dict(row)) for row in rows])


def figure(value: Any) -> dg.MetadataValue:
    """A number or a word as metadata; lists and objects as JSON."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return dg.MetadataValue.text(str(value))
    if isinstance(value, int):
        return dg.MetadataValue.int(value)
    return dg.MetadataValue.float(round(value, 4)) if isinstance(value, float) else dg.MetadataValue.json(value)


def _reporter(name: str, log: Callable[[str], None]) -> Progress:
    """Tell the watchers everything, and Dagster's log a line now and then."""
    last = -LOG_EVERY

    def report(event: dict[str, Any]) -> None:
        nonlocal last
        tell(name, event)
        now = time.monotonic()
        if event["event"] == "message":
            log(event["text"])
        elif event["event"] == "validation":
            log(f"validation loss {event['loss']:.4f}")
        elif event["event"] == "step" and (now - last >= LOG_EVERY or event["step"] == event["steps"]):
            last = now
            log(", ".join(f"{key} {value}" for key, value in event.items() if key != "event"))

    return report
