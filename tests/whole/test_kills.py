"""SIGKILL at thirty moments of a chain: what is published is whole, the next run goes on, and nothing is left over.

The chain is real, on a tiny model. Of the processes at work, the command line is killed (it is the step, too), or the
guard of a step's worker, or the worker. What comes out in the end must have the bytes of a project that was left alone.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest

from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.plan import open_store
from finetune_assets.store.artifact_store import CURRENT, STAGING, ArtifactStore
from finetune_assets.worker.launch import GRACE_SECONDS
from resources.dead_runs import UNFINISHED
from resources.gpu import POOL
from tests.conftest import REPOSITORY, MiniProject, make_mini, shared_cache
from tests.whole.test_chain import FINETUNE, Chain

KILLS = 30
SEED = 7
PATIENCE = 200.0  # seconds that a run may take on a busy machine
WIND_DOWN = GRACE_SECONDS + 5  # seconds within which nothing of a killed run is left
# Beside what an artifact is: pictures, and a log with times of day.
LOOKS = {"loss.png", "training_log.jsonl", "size_and_kl.png"}
WITH_WORKER = ("lora_adapter", "eval_metrics")  # their work is a process of its own
# Who is killed, in the making of what: everything once, and most where most of the time is spent.
MOMENTS = [
    *(("cli", asset) for asset in NODES),
    *(("cli", asset) for asset in NODES if asset not in WITH_WORKER),
    *((target, asset) for target in ("cli", "guard", "worker") for asset in WITH_WORKER for _ in range(2)),
    *((target, "lora_adapter") for target in ("guard", "worker")),
    ("cli", None),  # before the first step
    ("cli", None),
]


def project(folder: Path, base: Path) -> Chain:
    """A project of its own, with the instance settings of this repository and a temporary folder of its own."""
    made = make_mini(folder, base)
    made.cache.mkdir(parents=True)
    (made.cache / "wheels").symlink_to(shared_cache() / "wheels")
    shutil.copy(REPOSITORY / "dagster_home" / "dagster.yaml", made.home)
    chain = Chain(made)
    (folder / "tmp").mkdir()
    chain.environment["TMPDIR"] = str(folder / "tmp")
    return chain


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Chain:
    chain = project(tmp_path_factory.mktemp("undisturbed"), tiny_base)
    assert chain.run() == list(NODES)
    return chain


def content(mini: MiniProject) -> dict[str, dict[str, Any]]:
    """What every current artifact is, wherever the project lies."""
    store = open_store(mini)
    found = {}
    for asset in NODES:
        artifact = store.current("mini", asset)
        assert artifact is not None and artifact.damage(store.digests) is None, asset
        digests = {name: file["sha256"] for name, file in artifact.manifest["files"].items() if name not in LOOKS}
        whole: dict[str, Any] = {"fingerprint": artifact.fingerprint, "parts": artifact.manifest["parts"]}
        if asset == "ollama_model":
            # the Modelfile names the GGUF file by its path, so its digest is this folder's alone
            digests["Modelfile"] = (artifact.path / "Modelfile").read_text().replace(str(store.root), "STORE")
            whole["served"] = artifact.metrics["digest"]
        else:
            whole["data_version"] = artifact.data_version
        found[asset] = {**whole, "files": digests}
    return found


def processes(chain: Chain) -> list[psutil.Process]:
    """Every living process that works on this project, by its environment, and none of ours."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("FINETUNE_PROJECT") == str(chain.project.root)
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def named(chain: Chain, target: str) -> psutil.Process | None:
    """The guard, or the worker, if one is at work."""
    for process in processes(chain):
        try:
            line = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        is_guard = "guard.py" in line
        if is_guard if target == "guard" else "finetune_assets.worker" in line and not is_guard:
            return process
    return None


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


@pytest.fixture
def running(undisturbed: Chain, tmp_path: Path) -> Iterator[Chain]:
    """A second project with the same data, recipe and base; whatever is at work there is ended with the test."""
    chain = project(tmp_path, undisturbed.project.root / "base")
    yield chain
    for process in processes(chain):
        process.kill()


def kill_at(
    chain: Chain, target: str, asset: str | None, moment: float, log: Path, *, with_worker_stopped: bool = False
) -> bool:
    """Run the recipe and kill the target so many seconds after the asset was begun; False if it was through by then."""
    with log.open("wb") as errors:
        child = subprocess.Popen(
            [*FINETUNE, "run", "mini", "--json"],
            env=chain.environment,
            cwd=chain.project.root,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    victim = psutil.Process(child.pid)
    if asset is not None:
        begins = f"{asset}: begins".encode()
        wait_for(lambda: child.poll() is not None or begins in log.read_bytes(), PATIENCE)
        if target != "cli":
            wait_for(lambda: child.poll() is not None or named(chain, target), PATIENCE)
            victim = named(chain, target)
    if with_worker_stopped:
        worker = wait_for(lambda: named(chain, "worker"), PATIENCE)
        worker.suspend()  # it will neither come to an end nor hear of a SIGTERM
    time.sleep(moment)
    if victim is None or child.poll() is not None or not victim.is_running():
        assert child.wait(PATIENCE) == 0, log.read_text()
        return False
    victim.send_signal(signal.SIGKILL)
    # a guard or worker that was through with its work is not missed: the run goes on to its end
    code = child.wait(WIND_DOWN if target == "cli" else PATIENCE)
    assert code == -signal.SIGKILL if target == "cli" else code in (0, 1), log.read_text()
    assert "Traceback" not in log.read_text()
    return code != 0


def wipe(store: ArtifactStore, asset: str) -> None:
    for artifact in store.published("mini", asset):
        shutil.rmtree(artifact.path)


def assert_nothing_half_done(chain: Chain) -> None:
    """What counts as published is whole; no process of the run is left."""
    assert wait_for(lambda: not processes(chain), WIND_DOWN), f"still at work: {processes(chain)}"
    store = open_store(chain.project)
    for asset in NODES:
        assert [artifact.damage(store.digests) for artifact in store.published("mini", asset)] in ([], [None])


def claimed(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[Any], list[dg.DagsterRun]]:
    """Dagster's pools, who holds or waits for one of their slots, and the runs that it takes to be going on."""
    monkeypatch.setenv("DAGSTER_HOME", str(chain.project.home))
    with dg.DagsterInstance.get() as instance:
        storage = instance.event_log_storage
        pools = sorted(storage.get_concurrency_keys())
        taken = [storage.get_concurrency_info(pool) for pool in pools]
        held = [slot for info in taken for slot in (*info.claimed_slots, *info.pending_steps)]
        return pools, held, list(instance.get_runs(dg.RunsFilter(statuses=UNFINISHED)))


def test_killed_at_any_moment_the_next_run_ends_with_the_same_bytes(
    undisturbed: Chain, running: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    chance = random.Random(SEED)
    store = open_store(running.project)
    times = {asset: open_store(undisturbed.project).current("mini", asset) for asset in NODES}
    seconds = {asset: artifact.manifest["seconds"] if artifact else 0.0 for asset, artifact in times.items()}
    moments = list(MOMENTS)
    assert len(moments) == KILLS
    chance.shuffle(moments)
    tries = 0
    while moments:
        tries += 1
        assert tries < 3 * KILLS, f"left: {moments}"
        target, asset = moments.pop()
        if asset is not None:
            wipe(store, asset)
        longest = 1.5 if asset is None else 0.05 + 0.7 * seconds[asset]
        if not kill_at(running, target, asset, chance.uniform(0, longest), tmp_path / "log"):
            moments.insert(0, (target, asset))  # it was through: once more, later
        assert_nothing_half_done(running)

    done = running.finetune("run", "mini", timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert set(running.states().values()) == {"fresh"}
    assert content(running.project) == content(undisturbed.project)
    pools, held, going_on = claimed(running, monkeypatch)
    assert pools == [POOL]
    assert (held, going_on) == ([], [])

    # what the last one killed had begun is cleared without a run, too
    wipe(store, "lora_adapter")
    assert kill_at(running, "cli", "lora_adapter", 0.1, tmp_path / "log", with_worker_stopped=True)
    assert_nothing_half_done(running)
    assert list(store.folder("mini", "lora_adapter").glob(f"{STAGING}*"))
    collected = running.finetune("gc", "--keep", "99")
    assert collected.returncode == 0, collected.stderr
    for asset in NODES:
        folder = store.folder("mini", asset)
        published = {artifact.fingerprint for artifact in store.published("mini", asset)}
        assert len(published) == (asset != "lora_adapter")
        assert {path.name for path in folder.iterdir()} <= {".lock", CURRENT, *published}
