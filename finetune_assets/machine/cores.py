"""The number of processor cores that this process may use; more threads only wait for each other."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def cores() -> int:
    """Return the number of cores that the process may use, limited by the CPU time of its container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *_shares(CGROUPS, Path("/proc/self/cgroup"))]))


def _shares(root: Path, membership: Path) -> Iterator[int]:
    """Yield the number of cores that each control group allows, rounded up. https://docs.kernel.org/admin-guide/cgroup-v2.html

    Args:
        root: where control groups are mounted.
        membership: the file that names the group of this process; in a container, the root group.
    """
    try:
        (own,) = [line.removeprefix("0::/") for line in membership.read_text().splitlines() if line.startswith("0::/")]
        groups = [root / own, *(root / own).parents]
        for group in groups[: groups.index(root) + 1]:
            if (limit := group / "cpu.max").is_file():
                quota, period = limit.read_text().split()
                if quota != "max":
                    yield math.ceil(int(quota) / int(period))
        older = root / "cpu"  # version 1, where a container sees its own group
        if (limit := older / "cpu.cfs_quota_us").is_file() and (quota := int(limit.read_text())) > 0:
            yield math.ceil(quota / int((older / "cpu.cfs_period_us").read_text()))
    except (OSError, ValueError):  # a different system, or no permission
        return
