"""A step of a lineage as a Dagster asset, which builds or reuses the artifact and reports its version and metadata."""

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from finetune_assets.assets.checks import check_results, check_specs, failed_checks
from finetune_assets.assets.keys import HOME, OWNERS, Mount, asset_key, group_name, read_tags, source_keys, word_of
from finetune_assets.assets.node_metadata import code_reference, freshness, values_listing
from finetune_assets.export.serving_commands import commands as serving_commands
from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.materialise import Step, materialise
from finetune_assets.lineage.plan import open_store
from finetune_assets.lineage.prerequisites import check_prerequisites
from finetune_assets.lineage.readings import reading_of
from finetune_assets.machine.disk import disk_trouble
from finetune_assets.recipe import Recipe
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import FinetuneError, unforeseen
from finetune_assets.reporting.events import Begin, Done, Event, Message, Progress, StepProgress, Validation, publish
from finetune_assets.reporting.masking import mask, masked_error
from finetune_assets.reporting.printable import printable
from finetune_assets.store.artifact import Artifact, Made
from finetune_assets.worker.tasks.task import Task
from resources.dead_runs import tag_run
from resources.gpu import GpuResource
from resources.worker_pipes import run_worker

FORCE_TAG = "finetune/force"
LAST = "ollama_model"  # what is served: its age says whether the whole chain keeps to its schedule
LOG_EVERY = 10.0  # seconds: shortest time between two progress lines in Dagster's log


@dataclass(frozen=True)
class StepAsset:
    """The parts in which the assets differ.

    Args:
        pool: the Dagster pool that limits how many runs use a device at the same time.
        build: writes the artifact to `step.staging`; calls one ML room.
        describe: returns the artifact's metadata for the asset page.
        columns: the schema of the rows of a table.
    """

    name: str
    description: str
    kinds: set[str]
    pool: str | None = field(default=None, kw_only=True)
    build: Callable[[Step], Made]
    describe: Callable[[Artifact], Mapping[str, dg.MetadataValue]]
    columns: dg.TableSchema | None = field(default=None, kw_only=True)


def define(spec: StepAsset, recipe: Recipe, project: Project, mount: Mount = HOME) -> dg.AssetsDefinition:
    """Return the Dagster asset `<recipe>/<name>`."""
    node, key = NODES[spec.name], asset_key(recipe, spec.name, mount)

    @dg.asset(
        key=key,
        deps=[*source_keys(recipe, spec.name, mount), *(asset_key(recipe, up.asset, mount) for up in node.upstreams)],
        group_name=group_name(recipe, mount),
        description=_description(spec, recipe),
        kinds=spec.kinds,
        owners=list(mount.owners or OWNERS),
        tags={"recipe": word_of(recipe.name), **mount.tags},
        metadata={**code_reference(spec.build), **({"dagster/column_schema": spec.columns} if spec.columns else {})},
        freshness_policy=freshness(recipe.schedule) if spec.name == LAST else None,
        code_version=node.code_version,
        required_resource_keys={mount.gpu},
        pool=spec.pool,
        check_specs=check_specs(spec.name, recipe, key),
    )
    def step(context: dg.AssetExecutionContext) -> Iterator[Any]:
        try:
            result = _run(spec, recipe, project, mount, context)
        except FinetuneError as error:
            failure = error
        except Exception as error:  # any error of a library becomes a message that names the asset
            context.log.error(mask(traceback.format_exc()))
            failure = disk_trouble(error, project.home) or unforeseen(error, f"{recipe.name}/{spec.name}")
            failure.__cause__ = error
        else:
            yield result
            return
        yield from failed_checks(spec.name, recipe, failure.message, key)
        # Dagster shows a Failure's description instead of a traceback, and records its cause
        raise dg.Failure(description=printable(str(failure)), allow_retries=False) from masked_error(failure)

    return step


def _description(spec: StepAsset, recipe: Recipe) -> str:
    named = word_of(recipe.name) == recipe.name
    text = spec.description if named else f"{spec.description} Recipe: {recipe.name}."
    return f"{text}\n\n{values_listing(NODES[spec.name], recipe)}"


def _run(
    spec: StepAsset, recipe: Recipe, project: Project, mount: Mount, context: dg.AssetExecutionContext
) -> dg.MaterializeResult:
    """Build the artifact, or reuse it if it is up to date; return the result for Dagster."""
    publish(spec.name, Begin())
    tag_run(context)

    def launch(task: Task, progress: Progress) -> dict[str, Any]:
        gpu: GpuResource = getattr(context.resources, mount.gpu)
        with gpu.lease(progress) as lease:
            return run_worker(context, task.model_copy(update={"device": gpu.device}), progress, lease=lease)

    force = context.run.tags.get(FORCE_TAG) == "true"
    forced = [spec.name] if force else []
    check_prerequisites(recipe, project, open_store(project), _selected(recipe, mount, context), forced=forced)
    reporter = _reporter(spec.name, context.log.info)
    outcome = materialise(spec.name, recipe, project, spec.build, reporter, launch=launch, force=force)
    artifact = outcome.artifact
    publish(spec.name, Done(reused=outcome.reused))
    reading = reading_of(spec.name, artifact.manifest["ingredients"])
    upstreams = {name: used.data_version for name, used in outcome.inputs.items()}
    return dg.MaterializeResult(
        data_version=dg.DataVersion(artifact.data_version),
        metadata=page(spec, artifact, recipe, project, reused=outcome.reused),
        tags=read_tags(recipe, spec.name, reading, upstreams, mount),
        check_results=check_results(spec.name, recipe, artifact, asset_key(recipe, spec.name, mount)),
    )


def _selected(recipe: Recipe, mount: Mount, context: dg.AssetExecutionContext) -> list[str]:
    """Return the assets that a run brings up to date."""
    selected = context.run.asset_selection
    return [name for name in NODES if not selected or asset_key(recipe, name, mount) in selected]


def page(spec: StepAsset, artifact: Artifact, recipe: Recipe, project: Project, *, reused: bool) -> dict[str, Any]:
    """Return the metadata of an artifact for the asset's page, with its current paths."""
    commands = serving_commands(spec.name, artifact, recipe, project.ollama_models)
    return {
        **_described(spec, artifact),
        **({"serve it": dg.MetadataValue.md("\n".join(["```bash", *commands, "```"]))} if commands else {}),
        "artifact": dg.MetadataValue.path(artifact.path),
        "fingerprint": artifact.fingerprint,
        "seconds to build": float(artifact.manifest["seconds"]),
        "already published": reused,
    }


def _described(spec: StepAsset, artifact: Artifact) -> Mapping[str, Any]:
    """Return the asset's own metadata, or the raw metrics if an earlier release recorded too few of them."""
    try:
        return spec.describe(artifact)
    except Exception as error:  # and values that Dagster rejects: the page must not fail a published artifact
        return {
            "not described": dg.MetadataValue.text(f"its manifest lacks a value of this page: {error!r}"),
            "metrics": dg.MetadataValue.json(dict(artifact.metrics)),
        }


def table(rows: Sequence[Mapping[str, Any]]) -> dg.MetadataValue:
    """Return a metadata table; its columns are the keys of the first row."""
    return dg.MetadataValue.table([dg.TableRecord(dict(row)) for row in rows], None if rows else dg.TableSchema([]))


def figure(value: Any) -> dg.MetadataValue:
    """Return a number or a text as metadata; lists and objects become JSON."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return dg.MetadataValue.text(str(value))
    if isinstance(value, int):
        return dg.MetadataValue.int(value)
    return dg.MetadataValue.float(round(value, 4)) if isinstance(value, float) else dg.MetadataValue.json(value)


def _reporter(name: str, log: Callable[[str], None]) -> Progress:
    """Publish every event, and write messages and some of the progress to Dagster's log."""
    last = -LOG_EVERY

    def report(event: Event) -> None:
        nonlocal last
        publish(name, event)
        now = time.monotonic()
        match event:
            case Message():
                log(printable(mask(event.text)))
            case Validation():
                log(f"validation loss {event.loss:.4f}")
            case StepProgress() if now - last >= LOG_EVERY or event.step == event.steps:
                last = now
                log(", ".join(f"{key} {value}" for key, value in event.figures().items()))
            case _:
                pass

    return report
