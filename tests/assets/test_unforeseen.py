"""Errors that nobody foresaw: whatever a step raises, a run ends at once, with a message that names the asset."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetune_assets.assets.all_assets import STEPS
from finetune_assets.assets.automation import chain
from finetune_assets.cli import commands as cli
from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.materialise import Step
from finetune_assets.machine.disk import disk_trouble
from finetune_assets.reporting.causes import causes
from finetune_assets.store.artifact import Made
from tests.conftest import REPOSITORY, MiniProject, make_mini
from tests.support.history_fixtures import BODIES, stand_in

SECONDS = 20  # a run of stand-ins takes one or two


class TooLong(BaseException):
    """Not an Exception: what is under test must not catch it."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLong(f"still at work after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> MiniProject:
    """One for all: what is above the asset that fails is published by the tests before it, or by its own."""
    project = make_mini(tmp_path_factory.mktemp("unforeseen"))
    project.empty_base()
    return project


def steps(broken: str, error: Callable[[], Exception]) -> list[object]:
    """The chain's steps with stand-ins for what computes, one of which raises."""

    def fail(step: Step) -> Made:
        raise error()

    def merged(step: Step) -> Made:
        (step.staging / "config.json").write_text("{}")  # the commands on its page ask for it
        return stand_in(step)

    bodies = {**BODIES, "merged_model": merged, broken: fail}
    return [
        dataclasses.replace(step, build=bodies[step.name], describe=lambda artifact: {}, pool=None) for step in STEPS
    ]


def finetune(project: MiniProject, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command line itself, in this process; its exit code."""
    monkeypatch.setenv("FINETUNE_PROJECT", str(project.root))
    monkeypatch.setenv("DAGSTER_HOME", str(project.home))
    monkeypatch.setattr(sys, "argv", ["finetune", *arguments])
    with pytest.raises(SystemExit) as ended, at_most(SECONDS):
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("asset", NODES)
def test_a_value_error_in_a_step_ends_the_run(
    project: MiniProject, asset: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(chain, "STEPS", steps(asset, lambda: ValueError("seven is no even number")))
    assert finetune(project, monkeypatch, "run", "mini", "--to", asset, "--force") == 1
    said = capfd.readouterr().err
    assert f"mini/{asset} failed unexpectedly: ValueError: seven is no even number" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (lambda: RecursionError("too deep"), "failed unexpectedly: RecursionError: too deep"),
        (lambda: KeyError("weight"), "failed unexpectedly: KeyError: 'weight'"),
        (lambda: AssertionError(), "failed unexpectedly: AssertionError"),
        (lambda: MemoryError(), "mini/raw_dataset failed: not enough memory"),
        (lambda: OSError(28, "No space left on device"), "no space left on the disk"),
        (lambda: ValueError("x" * 10**6), "xxx..."),
    ],
)
def test_errors_of_other_kinds(
    tmp_path: Path,
    error: Callable[[], Exception],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    project = make_mini(tmp_path)
    project.empty_base()
    monkeypatch.setattr(chain, "STEPS", steps("raw_dataset", error))
    assert finetune(project, monkeypatch, "run", "mini", "--to", "raw_dataset") == 1
    said = capfd.readouterr().err
    assert words in said and len(said) < 2000 and "Traceback" not in said


def test_dagster_on_its_own_ends_too(tmp_path: Path):
    project = make_mini(tmp_path)
    project.empty_base()
    (project.root / "defs.py").write_text(
        "from finetune_assets.assets.automation import chain\n"
        "from finetune_assets.definitions import load_definitions\n"
        "from finetune_assets.recipe.project import Project\n"
        "from tests.assets.test_unforeseen import steps\n"
        "chain.STEPS = steps('raw_dataset', lambda: ValueError('seven is no even number'))\n"
        "defs = load_definitions(Project.find())\n"
    )
    environment = {**os.environ, "FINETUNE_PROJECT": str(project.root), "DAGSTER_HOME": str(project.home)}
    environment["PYTHONPATH"] = f"{REPOSITORY}:{project.root}"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "dagster", "job", "execute", "-m", "defs", "-j", "mini_job"],
        env=environment, cwd=project.root, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and time.monotonic() - began < 60
    assert "mini/raw_dataset failed unexpectedly: ValueError: seven is no even number" in done.stderr


def test_errors_in_a_ring_are_seen_once_each():
    first, second = ValueError("first"), KeyError("second")
    first.__cause__, second.__context__ = second, first
    with at_most(SECONDS):
        assert list(causes(first)) == [first, second]
        assert disk_trouble(first, Path()) is None


def test_what_a_traceback_leaves_out_is_no_cause():
    shown, hidden = ValueError("shown"), OSError(28, "No space left on device")
    shown.__context__, shown.__suppress_context__ = hidden, True
    assert list(causes(shown)) == [shown]
