"""Section `schedule`."""

from __future__ import annotations

from zoneinfo import ZoneInfo

from pydantic import Field, field_validator

from finetune_assets.recipe.cron import cron_problem
from finetune_assets.recipe.sections.section import Section


class ScheduleSection(Section):
    """When runs start by themselves."""

    on_change: bool = Field(
        default=False, description="Start a run when what the recipe reads has changed (the retrain sensor)."
    )
    minimum_interval_seconds: int = Field(
        default=30, ge=1, description="Shortest time between two checks of the retrain sensor. Unit: seconds."
    )
    cron: str | None = Field(
        default=None, description="Times of runs, as a cron expression of five fields; without it, no schedule."
    )
    execution_timezone: str = Field(default="UTC", description="Time zone of cron, by its IANA name.")

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
            raise ValueError(f"unknown time zone {name!r}: use an IANA name, such as Europe/Berlin") from None
        return name
