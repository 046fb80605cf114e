"""Run a recipe's chain through Dagster in this process, so that the UI and the command line share one history."""

from __future__ import annotations

import os
from collections.abc import Collection

from finetune_assets.lineage.readings import observe
from finetune_assets.machine.disk import disk_trouble
from finetune_assets.recipe import Recipe
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import FinetuneError, StepFailed, unforeseen
from finetune_assets.reporting.events import Watcher, watching


def run_chain(
    recipe: Recipe,
    project: Project,
    assets: Collection[str],
    watcher: Watcher,
    *,
    force: bool = False,
) -> str:
    """Materialise the named assets of a recipe, upstreams first; return the Dagster run's id.

    Raises:
        StepFailed: a step failed (the message is the step's), or Dagster's history cannot be written.
    """
    import dagster as dg
    from filelock import FileLock

    from finetune_assets.assets.automation.chain import bound, recipe_definitions
    from finetune_assets.assets.automation.events import pending_events
    from finetune_assets.assets.automation.sensors import TARGET_TAG
    from finetune_assets.assets.keys import asset_key, job_name
    from finetune_assets.assets.step_asset import FORCE_TAG
    from resources.dead_runs import end_dead_runs, this_process

    os.environ["DAGSTER_HOME"] = str(project.home)
    job = bound(recipe_definitions(recipe, project)).resolve_job_def(job_name(recipe.name))
    tags = {TARGET_TAG: observe(recipe, project).target, **({FORCE_TAG: "true"} if force else {})}
    try:
        project.home.mkdir(parents=True, exist_ok=True)
        with FileLock(project.home / ".instance.lock"):
            # two first runs at the same time would both create Dagster's tables
            opened = dg.DagsterInstance.get()
        with opened as instance, watching(watcher):
            end_dead_runs(instance)
            result = job.execute_in_process(
                instance=instance,
                asset_selection=[asset_key(recipe, name) for name in assets],
                tags={**tags, **this_process()},
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            )
            for event in pending_events(observe(recipe, project), instance):
                instance.report_runless_asset_event(event)
            return result.run_id
    except dg.Failure as failure:
        raise StepFailed(failure.description or "a step failed") from failure
    except dg.DagsterExecutionInterruptedError:
        raise KeyboardInterrupt from None  # Dagster converted it from this
    except FinetuneError:
        raise
    except Exception as error:
        # Dagster's history is on this disk, too
        full = disk_trouble(error, project.home, outcome="what was published stays")
        raise full or unforeseen(error, f"the run of {recipe.name}") from error
