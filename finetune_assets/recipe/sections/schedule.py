"""Section `schedule`."""

from __future__ import annotations

from zoneinfo import ZoneInfo

from pydantic import Field, field_validator

from finetune_assets.recipe.cron import cron_problem
from finetune_assets.recipe.sections.section import Section


class ScheduleSection(Section):
    """When the recipe runs by itself."""

    on_change: bool = Field(default=False, description="Run when what the recipe reads has changed: the retrain sensor")
    minimum_interval_seconds: int = Field(default=30, ge=1, description="How often the sensor looks")
    cron: str | None = Field(default=None, description="Five fields, e.g. '0 3 * * *'; none: only when asked")
    execution_timezone: str = Field(default="UTC", description="Of cron, e.g. Asia/Shanghai")

    @field_validator("cron")
    @classmethod
    def _five_fields(cls, cron: str | None) -> str | None:
        if cron is not None and (why := cron_problem(cron)) is not None:
            raise ValueError(f"{cron!r} {why}")
        return cron

    @field_validator("execution_timezone")
    @classmethod
    def _known_timezone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ValueError, OSError, LookupError):
            raise ValueError(f"unknown time zone {name!r}: take one of the IANA's names, as Europe/Berlin") from None
        return name
