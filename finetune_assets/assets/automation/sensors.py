"""Sensors and schedules: they start runs (if a recipe turns them on), observe changes and report failures.

Both use the plan. A sensor is level-triggered: it does not wait for a change, but compares the published artifacts with
the recipe. So it does not miss a change that happened while it was off, or during a run.
"""

from collections.abc import Callable, Mapping
from functools import partial

import dagster as dg
from dagster import DagsterInstance, DagsterRun, RunsFilter

from finetune_assets.assets.automation.events import Event, confirmation, pending_events
from finetune_assets.assets.automation.sources import recipe_now
from finetune_assets.assets.keys import HOME, Mount, asset_key, chain_key, job_name, stem
from finetune_assets.lineage.readings import Observed, observe
from finetune_assets.recipe import Recipe
from finetune_assets.recipe.file import load_recipe, recipe_files, recipe_name
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import FinetuneError, clean, unforeseen
from resources.dead_runs import end_dead_runs, unfinished_run_of
from resources.webhook import WebhookResource

TARGET_TAG = "finetune/target"
OBSERVE_SECONDS = 30


def retrain_sensor(recipe: Recipe, project: Project, mount: Mount = HOME) -> dg.SensorDefinition:
    """Return a sensor that runs a recipe's stale assets: once for each target, and never during a run of the recipe."""

    @dg.sensor(
        name=f"{stem(recipe.name, mount)}_retrain",
        job_name=job_name(recipe.name, mount),
        minimum_interval_seconds=recipe.schedule.minimum_interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING if recipe.schedule.on_change else dg.DefaultSensorStatus.STOPPED,
        description=f"Runs the stale assets of {recipe.name} when two evaluations in a row find the same state.",
    )
    def retrain(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        chain = chain_key(recipe.name, mount)
        now = recipe_now(recipe, project, mount)
        if recipe.schedule.on_change and not now.schedule.on_change:
            return dg.SensorResult(skip_reason=f"schedule.on_change of {recipe.name} is off")
        end_dead_runs(context.instance)
        if (run := unfinished_run_of(recipe.name, context.instance, chain)) is not None:
            return dg.SensorResult(skip_reason=f"run {run.run_id[:8]} of {recipe.name} is {run.status.value.lower()}")
        observed = observe(now, project)
        if not observed.stale:
            return dg.SensorResult(skip_reason="everything is up to date", cursor="")
        target = observed.target
        if context.cursor != target:
            # a file may still be changing: training must not read a half-copied file
            return dg.SensorResult(
                skip_reason=f"{_in_words(observed)}; starts a run if the next evaluation finds the same state",
                cursor=target,
            )
        last = _last_attempt(recipe.name, context.instance)
        if last is not None and last.tags.get(TARGET_TAG) == target and not last.is_success:
            how = last.status.value.lower()
            return dg.SensorResult(
                skip_reason=f"run {last.run_id[:8]} for exactly this state: {how}; "
                "change the recipe or its data, or start a run by hand",
                cursor=target,
            )
        # with this key, two requests for a target after the same run start only one run
        return dg.SensorResult(
            [request(observed, mount, run_key=f"{target} after {last.run_id if last else 'none'}")], cursor=target
        )

    return retrain


def schedule(recipe: Recipe, project: Project, mount: Mount = HOME) -> dg.ScheduleDefinition:
    """Return a schedule that runs a recipe's stale assets at the times of `schedule.cron`, even after a failed run."""

    @dg.schedule(
        name=f"{stem(recipe.name, mount)}_schedule",
        job_name=job_name(recipe.name, mount),
        cron_schedule=str(recipe.schedule.cron),
        execution_timezone=recipe.schedule.execution_timezone,
        default_status=dg.DefaultScheduleStatus.RUNNING,
    )
    def at_its_time(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        end_dead_runs(context.instance)
        observed = observe(recipe_now(recipe, project, mount), project)
        if observed.stale:
            return request(observed, mount)
        if (event := confirmation(observed, mount)) is not None:
            context.instance.report_runless_asset_event(event)
        return dg.SkipReason("everything is up to date")

    return at_its_time


def observe_sensor(project: Project) -> dg.SensorDefinition:
    """Return a sensor that reports changed recipes and data to Dagster, whose pages then show what is stale."""

    def recipes() -> dict[str, Callable[[], Recipe]]:
        return {recipe_name(path): partial(load_recipe, path) for path in recipe_files(project.configs)}

    return _observing("observe", project, HOME, recipes)


def observe_one_sensor(recipe: Recipe, project: Project, mount: Mount) -> dg.SensorDefinition:
    """Return a sensor that observes one recipe mounted in a different Dagster project."""
    recipes = {recipe.name: partial(recipe_now, recipe, project, mount)}
    return _observing(f"{stem(recipe.name, mount)}_observe", project, mount, lambda: recipes)


def _observing(
    name: str, project: Project, mount: Mount, recipes: Callable[[], Mapping[str, Callable[[], Recipe]]]
) -> dg.SensorDefinition:
    """Return a sensor that observes recipes.

    Args:
        recipes: returns each recipe's name with a function that reads the recipe.
    """

    @dg.sensor(
        name=name,
        minimum_interval_seconds=OBSERVE_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Reads the files of recipes and data sets and reports those that changed. Starts no run.",
    )
    def observe_recipes(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        end_dead_runs(context.instance)
        events, broken = [], []
        for recipe, read in recipes().items():
            try:
                events += pending_events(observe(read(), project), context.instance, mount)
            except Exception as error:  # an error in one recipe must not hide changes in the others
                known = error if isinstance(error, FinetuneError) else unforeseen(error, "the observation")
                broken.append(f"{clean(recipe)}: {known}")
                context.log.warning(broken[-1])
        unique = {_identity(event): event for event in events}  # recipes share data sets
        return dg.SensorResult(
            asset_events=list(unique.values()), skip_reason="\n".join([f"events reported: {len(unique)}", *broken])
        )

    return observe_recipes


def _identity(event: Event) -> tuple[object, ...]:
    if isinstance(event, dg.AssetCheckEvaluation):
        return event.asset_key, event.check_name
    return event.asset_key, str(event.tags)


def failure_sensor() -> dg.SensorDefinition:
    """Return a sensor that posts failed runs to the webhook, if one is set."""

    @dg.run_failure_sensor(name="failure_webhook", default_status=dg.DefaultSensorStatus.RUNNING)
    def report(context: dg.RunFailureSensorContext, webhook: WebhookResource) -> dg.SkipReason | None:
        if not webhook.is_set:
            return dg.SkipReason("no webhook is set (FINETUNE_FAILURE_WEBHOOK)")
        steps = [event.step_key for event in context.get_step_failure_events() if event.step_key]
        webhook.post_failure(
            recipe=context.dagster_run.tags.get("recipe"),
            run_id=context.dagster_run.run_id,
            asset=_asset_of(steps[0], context.dagster_run.tags.get("recipe")) if steps else None,
            message=_cause(context),
        )
        return None

    return report


def request(observed: Observed, mount: Mount = HOME, run_key: str | None = None) -> dg.RunRequest:
    """Return the request for a run of all stale assets."""
    return dg.RunRequest(
        run_key=run_key,
        asset_selection=[asset_key(observed.recipe, name, mount) for name in observed.stale],
        tags={TARGET_TAG: observed.target},
    )


def _last_attempt(recipe: str, instance: DagsterInstance) -> DagsterRun | None:
    """Return the last run for the whole recipe, started by sensor, schedule or command line."""
    for run in instance.get_runs(RunsFilter(tags={"recipe": recipe}), limit=20):
        if TARGET_TAG in run.tags:
            return run
    return None


def _in_words(observed: Observed) -> str:
    first = observed.plan[observed.stale[0]]
    return f"{first.asset} is {first.state}: {'; '.join(first.reasons)}"


def _asset_of(step: str, recipe: str | None) -> str:
    """Return `demo/lora_adapter` for the step `demo__lora_adapter`, with the recipe's real name if the run has it."""
    word, _, asset = step.rpartition("__")
    return f"{recipe or word}/{asset}"


def _cause(context: dg.RunFailureSensorContext) -> str:
    for event in context.get_step_failure_events():
        data = event.step_failure_data
        if data.user_failure_data and data.user_failure_data.description:
            return data.user_failure_data.description
        if data.error:
            return data.error.message
    return context.failure_event.message or "the run gave no reason"
