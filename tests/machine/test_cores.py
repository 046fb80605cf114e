"""The number of cores that a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune_assets.machine import cores
from finetune_assets.machine.cores import _shares

pytestmark = pytest.mark.fast


def group(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content + "\n")
    return folder


def member(folder: Path, path: str) -> Path:
    (folder / "cgroup").write_text(f"1:name=systemd:/\n0::{path}\n")
    return folder / "cgroup"


def test_the_share_of_a_container_and_of_what_it_is_in(tmp_path: Path) -> None:
    root = group(tmp_path / "root")
    group(root / "a", cpu__max="250000 100000")
    group(root / "a" / "b", cpu__max="max 100000")
    assert [*_shares(root, member(tmp_path, "/a/b"))] == [3]
    group(root, cpu__max="100000 100000")  # as it is seen from inside
    assert [*_shares(root, member(tmp_path, "/"))] == [1]
    assert sorted(_shares(root, member(tmp_path, "/a"))) == [1, 3]


def test_the_older_control_groups(tmp_path: Path) -> None:
    root = group(tmp_path / "root")
    group(root / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert [*_shares(root, member(tmp_path, "/"))] == []
    group(root / "cpu", cpu__cfs_quota_us="150000")
    assert [*_shares(root, member(tmp_path, "/"))] == [2]


def test_without_control_groups(tmp_path: Path) -> None:
    assert [*_shares(tmp_path / "no", tmp_path / "none")] == []
    (tmp_path / "strange").write_text("what")
    assert [*_shares(tmp_path, tmp_path / "strange")] == []


def test_the_smallest_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    allowed = cores.cores()
    assert 1 <= allowed <= (os.cpu_count() or 1)
    group(tmp_path, cpu__max="50000 100000")
    assert cores.cores() == 1
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)))
        group(tmp_path, cpu__max="800000 100000")
        assert cores.cores() == 7
