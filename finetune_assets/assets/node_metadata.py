"""What Dagster's pages say of a node before it has run: its recipe values, its source file, how fresh it has to be."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import dagster as dg

from finetune_assets.lineage.identity import default, shown
from finetune_assets.lineage.node import Node
from finetune_assets.recipe import Recipe
from finetune_assets.recipe.sections.schedule import ScheduleSection

HORIZONS = (timedelta(days=15), timedelta(days=800))  # of a cron expression's ticks; the second one for rare ticks
SLACK = timedelta(hours=1)  # for a run to end
STAMP = "%Y-%m-%dT%H:%M%z"


def values_listing(node: Node, recipe: Recipe) -> str:
    """Return a Markdown table of all recipe values that an asset reads; defaults are in italics."""
    rows = ["| recipe key | value |", "|---|---|"]
    for read in node.reads:
        name, _, key = read.partition(".")
        section = getattr(recipe, name)
        for field in [key] if key else type(section).model_fields:
            value = getattr(section, field)
            text = shown(value).replace("|", "\\|").replace("\n", " ").replace("`", "'")
            rows.append(f"| {name}.{field} | {_cell(text, is_default=value == default(section, field))} |")
    return "\n".join(rows)


def code_reference(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the metadata that links to the source of a function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)  # Dagster calls code references beta
        reference = dg.LocalFileCodeReference(
            file_path=str(inspect.getsourcefile(function)),
            line_number=inspect.getsourcelines(function)[1],
            label=function.__module__,
        )
        value = dg.CodeReferencesMetadataValue(code_references=[reference])
        return {"dagster/code_references": value}


def freshness(schedule: ScheduleSection) -> dg.FreshnessPolicy | None:
    """Return how old what is served may be: a warning after one missed run of the schedule, a failure after two."""
    pause = longest_pause(schedule.cron, schedule.execution_timezone) if schedule.cron else None
    if pause is None:
        return None
    return dg.FreshnessPolicy.time_window(fail_window=2 * pause + SLACK, warn_window=pause + SLACK)


def longest_pause(cron: str, timezone: str) -> timedelta | None:
    """Return the longest time between two ticks of a cron expression; None if it has fewer than three in two years."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    for horizon in HORIZONS:
        partitions = dg.TimeWindowPartitionsDefinition(
            start=start.strftime(STAMP), fmt=STAMP, cron_schedule=cron, timezone=timezone
        )
        keys = partitions.get_partition_keys(current_time=start + horizon)
        ticks = [datetime.strptime(key, STAMP) for key in keys]
        if len(ticks) >= 3:
            return max(later - tick for tick, later in pairwise(ticks))
    return None


def _cell(text: str, *, is_default: bool) -> str:
    return f"*{text} (default)*" if is_default else f"`{text}`"
