"""How many processor cores this process may use: more threads than that only wait for one another."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def cores() -> int:
    """Cores of this machine that the process is allowed on, or that its container's share of time comes to."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *_shares(CGROUPS, Path("/proc/self/cgroup"))]))


def _shares(root: Path, membership: Path) -> Iterator[int]:
    """Cores' worth of time that control groups allow, rounded up. https://docs.kernel.org/admin-guide/cgroup-v2.html

    Args:
        root: where control groups are mounted.
        membership: the file that tells the process' own group; inside a container that is the root.
    """
    try:
        (own,) = [line.removeprefix("0::/") for line in membership.read_text().splitlines() if line.startswith("0::/")]
        groups = [root / own, *(root / own).parents]
        for group in groups[: groups.index(root) + 1]:
            if (limit := group / "cpu.max").is_file():
                quota, period = limit.read_text().split()
                if quota != "max":
                    yield math.ceil(int(quota) / int(period))
        older = root / "cpu"  # version 1, which shows a container its own group
        if (limit := older / "cpu.cfs_quota_us").is_file() and (quota := int(limit.read_text())) > 0:
            yield math.ceil(quota / int((older / "cpu.cfs_period_us").read_text()))
    except (OSError, ValueError):  # another system, or one that does not let us look
        return
