"""Private names of Dagster, which any release may change; no other module imports one.

The resolver computes the badges of Dagster's pages; a tick is one evaluation of a sensor.
"""

from __future__ import annotations

from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest
from dagster._core.scheduler.instigation import InstigatorTick

CHECKED_ON = "1.13.27"  # the release of Dagster on which these names were last looked at

__all__ = ["CHECKED_ON", "CachingStaleStatusResolver", "InstigatorTick", "LoadingContextForTest"]
