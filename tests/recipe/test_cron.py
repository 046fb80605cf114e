"""Cron expressions: the check without Dagster gives the same result as Dagster."""

from __future__ import annotations

import random

import dagster as dg
import pytest

from finetune_assets.recipe.cron import FIELDS, cron_problem

pytestmark = pytest.mark.fast

PIECES = ("*", "0", "5", "29", "31", "60", "24", "7", "8", "1-5", "5-1", "*/5", "*/0", "*/90", "1-5/2", "3/4", "1,2",
          "mon", "jan", "MON-FRI", "L", "5#2", "x", "-1", "1-", "/2", "1//2")  # fmt: skip


def dagster_accepts(expression: str) -> bool:
    try:
        dg.ScheduleDefinition(name="x", job_name="x", cron_schedule=expression)
    except Exception:
        return False
    return True


def test_it_agrees_with_dagster():
    """A thousand expressions, most of them wrong. Only this check refuses days that no month has."""
    dice = random.Random(0)
    seen = set()
    for _ in range(1000):
        parts = ["*"] * len(FIELDS)
        for place in dice.sample(range(len(FIELDS)), 2):
            parts[place] = dice.choice(PIECES)
        expression = " ".join(parts)
        problem = cron_problem(expression)
        seen.add(problem)
        if problem != "names a day that does not exist in its months":
            assert (problem is None) == dagster_accepts(expression), expression
    assert None in seen and len(seen) >= 2


@pytest.mark.parametrize(
    "expression", ["0 0 30 2 *", "0 0 31 feb,apr *", "@daily", "* * * *", "* * * * * *", "", "0 0 * * x"]
)
def test_an_expression_without_times_is_refused(expression: str):
    assert cron_problem(expression) is not None


@pytest.mark.parametrize(
    "expression", ["0 3 * * *", "*/15 8-18 * * mon-fri", "0 0 29 2 *", "0 0 31 2 mon", "0 0 L * *"]
)
def test_an_expression_with_times_is_accepted(expression: str):
    assert cron_problem(expression) is None
