"""Cron expressions: whether Dagster accepts one.

This module checks the usual ones, because importing Dagster takes seconds and `finetune plan` does not need it
otherwise. Dagster itself checks every other expression: its croniter knows more (`L`, `#`, wrapped ranges).
"""

from __future__ import annotations

import calendar
import re

MONTHS = {name.lower(): number for number, name in enumerate(calendar.month_abbr) if name}
WEEKDAYS: dict[str, int] = dict(zip(("sun", "mon", "tue", "wed", "thu", "fri", "sat"), range(7), strict=True))
FIELDS: tuple[tuple[int, int, dict[str, int]], ...] = (
    (0, 59, {}),
    (0, 23, {}),
    (1, 31, {}),
    (1, 12, MONTHS),
    (0, 7, WEEKDAYS),
)
ITEM = re.compile(r"(?:(\*)|([0-9]{1,2}|[a-z]{3})(?:-([0-9]{1,2}|[a-z]{3}))?)(?:/([0-9]{1,2}))?")
DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
FORM = re.compile(r"[0-9A-Za-z*,/#-]{1,200}(?: +[0-9A-Za-z*,/#-]{1,200}){4}")


def cron_problem(expression: str) -> str | None:
    """Return what is wrong with a cron expression of five fields; None if Dagster accepts it."""
    fields = expression.lower().split()
    if not FORM.fullmatch(expression):
        return "is not a valid cron expression: write minute, hour, day, month and weekday, as in '0 3 * * *'"
    usual = [_values(text, *limits) for text, limits in zip(fields, FIELDS, strict=True)]
    if None in usual:
        return None if _dagster_accepts(expression) else "is not a valid cron expression for Dagster"
    days, months = usual[2] or set(), usual[3] or set()
    if fields[4] == "*" and all(min(days) > DAYS[month - 1] for month in months):
        return "names a day that does not exist in its months"
    return None


def _values(text: str, least: int, most: int, names: dict[str, int]) -> set[int] | None:
    """Return the values of one field; None if it is not of the usual kind."""
    values: set[int] = set()
    for item in text.split(","):
        if (match := ITEM.fullmatch(item)) is None:
            return None
        every, first, last, step = match.groups()
        low = least if every else _number(first, names)
        high = most if every or (step and not last) else low if last is None else _number(last, names)
        stride = int(step or 1)
        if low is None or high is None or not least <= low <= high <= most or not 1 <= stride <= most:
            return None
        values |= set(range(low, high + 1, stride))
    return values


def _number(text: str, names: dict[str, int]) -> int | None:
    return int(text) if text.isdecimal() else names.get(text)


def _dagster_accepts(expression: str) -> bool:
    import dagster as dg

    try:
        dg.ScheduleDefinition(name="check", job_name="check", cron_schedule=expression)
    except dg.DagsterInvalidDefinitionError:
        return False
    return True
