"""A run is cancelled, from the terminal, from the UI, by force: nothing stays at work, and nothing half-made counts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest

from finetune_assets.assets.base_model import BASE_MODEL
from finetune_assets.lineage.materialise import materialise
from finetune_assets.recipe.file import load_recipe
from tests.conftest import REPOSITORY, MiniProject, shared_cache
from tests.support.history_fixtures import make_chain, plan_of, store_of
from tests.worker.test_launch import HEAD, gone

GRACE_SECONDS = 1.0
WORDS = "stubborn and proud of it"

# Ignores what it is asked, and so does what it starts; what it leaves looks as whole as it can.
WORKER = """
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(300)"])  # ignores them, too
for name in ("adapter_model.safetensors", "manifest.json"):
    open(os.path.join(job["out"], name), "w").close()
with open(PIDS + ".partial", "w") as file:
    json.dump([os.getppid(), os.getpid(), child.pid], file)
os.rename(PIDS + ".partial", PIDS)
say("opened", extras={})
say("log", message=WORDS, level="INFO")
time.sleep(300)
"""

# The project's own definitions, but for the worker's command and the time it gets.
DEFINITIONS = """
import functools, sys
from finetune_assets.assets import step_asset
from resources.worker_pipes import run_worker

worker = (sys.executable, "-S", {worker!r})
step_asset.run_worker = functools.partial(run_worker, worker=worker, grace_seconds={grace})

from finetune_assets.definitions import defs
"""


class Stubborn:
    """A project whose adapter is next, and is trained by a worker that does not want to stop."""

    def __init__(self, project: MiniProject):
        self.project = project
        self.pids_file = project.root / "pids.json"
        self.started: list[psutil.Process] = []
        script = project.root / "stubborn_worker.py"
        script.write_text(f"PIDS, WORDS = {str(self.pids_file)!r}, {WORDS!r}\n{HEAD}{WORKER}")
        (project.root / "stubborn.py").write_text(DEFINITIONS.format(worker=str(script), grace=GRACE_SECONDS))
        make_chain(project, upto="dataset_info")
        recipe = load_recipe(project.recipe_path())
        materialise("base_model", recipe, project, BASE_MODEL.build, lambda event: None)
        (project.cache / "wheels").symlink_to(shared_cache() / "wheels")

    def start_cli(self) -> subprocess.Popen[str]:
        """`finetune run` in a process group of its own, as a shell starts it."""
        main = "import stubborn; from finetune_assets.cli import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", main, "run", "mini", "--to", "lora_adapter"],
            cwd=self.project.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(psutil.Process(process.pid))
        return process

    def start_ui(self) -> tuple[subprocess.Popen[bytes], str]:
        """`dagster dev`, and its address."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        process = subprocess.Popen(
            [sys.executable, "-m", "dagster", "dev", "-m", "stubborn", "-h", "127.0.0.1", "-p", port],
            cwd=self.project.root,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.started.append(psutil.Process(process.pid))
        return process, f"http://127.0.0.1:{port}"

    def at_work(self) -> list[int]:
        """The guard, the worker and the worker's child, as soon as all are there and Dagster's log has its words."""
        wait_for(self.pids_file.exists, 90)
        pids = json.loads(self.pids_file.read_text())
        self.started += [psutil.Process(pid) for pid in pids]
        wait_for(lambda: WORDS in self.run()[1], 20)
        return pids

    def assert_all_gone(self, pids: list[int], since: float) -> None:
        assert all(gone(pid, since + GRACE_SECONDS + 5 - time.monotonic()) for pid in pids)

    def assert_nothing_published(self) -> None:
        assert plan_of(self.project)["lora_adapter"].state == "missing"
        assert store_of(self.project).published("mini", "lora_adapter") == []

    def staging(self) -> list[Path]:
        return list(store_of(self.project).folder("mini", "lora_adapter").glob(".staging-*"))

    def kill(self) -> None:
        """For tests that fail: nothing stays at work."""
        for process in self.started:
            with contextlib.suppress(psutil.NoSuchProcess):
                for member in (*process.children(recursive=True), process):
                    member.kill()

    def run(self) -> tuple[dg.DagsterRunStatus, str]:
        """The status of the one run, and its log."""
        with dg.DagsterInstance.get() as instance:
            (run,) = instance.get_runs()
            return run.status, "\n".join(entry.user_message for entry in instance.all_logs(run.run_id))


@pytest.fixture
def stubborn(mini: MiniProject, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stubborn]:
    shutil.copytree(tiny_base, mini.root / "base")
    monkeypatch.setenv("DAGSTER_HOME", str(mini.home))
    monkeypatch.setenv("FINETUNE_PROJECT", str(mini.root))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    folder = mini.root.parent / "t"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))  # a device lock of its own: no waiting for whoever computes here
    made = Stubborn(mini)
    yield made
    made.kill()


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"nothing within {seconds:.0f} s"
        time.sleep(0.1)
    return found


def test_ctrl_c_in_the_terminal(stubborn: Stubborn) -> None:
    process = stubborn.start_cli()
    pids = stubborn.at_work()
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    stubborn.assert_all_gone(pids, began)
    assert process.returncode == 130 and "interrupted; " in said
    assert not stubborn.staging()
    stubborn.assert_nothing_published()
    status, log = stubborn.run()
    assert status == dg.DagsterRunStatus.FAILURE, "Dagster calls cancelled what was asked for through Dagster"
    assert "Execution was interrupted" in log


def test_the_step_is_killed(stubborn: Stubborn) -> None:
    process = stubborn.start_cli()
    pids = stubborn.at_work()
    began = time.monotonic()
    process.kill()
    process.communicate(timeout=30)
    stubborn.assert_all_gone(pids, began)
    assert stubborn.staging(), "it is left to be swept"
    stubborn.assert_nothing_published()


LAUNCH = """mutation ($params: ExecutionParams!) { launchRun(executionParams: $params) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
TERMINATE = "mutation ($run: String!) { terminateRun(runId: $run) { __typename } }"
STATUS = "query ($run: ID!) { runOrError(runId: $run) { ... on Run { status } } }"
READY = "{ repositoriesOrError { ... on RepositoryConnection { nodes { name location { name } } } } }"


def test_cancelled_in_the_ui(stubborn: Stubborn) -> None:
    server, address = stubborn.start_ui()

    def ask(query: str, **variables: Any) -> Any:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"{address}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return next(iter(json.load(reply)["data"].values()))

    def location() -> Any:
        with contextlib.suppress(OSError):  # it is not listening yet
            return ask(READY).get("nodes")

    (place,) = wait_for(location, 120)
    selector = {
        "repositoryName": place["name"],
        "repositoryLocationName": place["location"]["name"],
        "jobName": "mini_job",
        "assetSelection": [{"path": ["mini", "lora_adapter"]}],
    }
    launched = ask(LAUNCH, params={"selector": selector, "mode": "default", "runConfigData": {}})
    assert launched["__typename"] == "LaunchRunSuccess", launched
    run = launched["run"]["runId"]
    pids = stubborn.at_work()
    began = time.monotonic()
    assert ask(TERMINATE, run=run)["__typename"] == "TerminateRunSuccess"
    stubborn.assert_all_gone(pids, began)
    wait_for(lambda: ask(STATUS, run=run)["status"] not in ("STARTED", "CANCELING"), 30)
    assert ask(STATUS, run=run)["status"] == "CANCELED"
    assert not stubborn.staging()
    stubborn.assert_nothing_published()
    server.terminate()
    server.wait(30)
