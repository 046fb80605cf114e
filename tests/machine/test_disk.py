"""Real disks that are full or read-only: the message, no files left behind, and success after a correction."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from finetune_assets.assets.automation.chain import bound, recipe_definitions
from finetune_assets.assets.keys import job_name
from finetune_assets.lineage.materialise import Step, materialise
from finetune_assets.lineage.plan import make_plan, open_store
from finetune_assets.recipe.file import load_recipe
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.store.artifact import Made
from tests.conftest import REPOSITORY, MiniProject, rows
from tests.lineage.test_plan import make, make_data, plan
from tests.models.test_hub import COMMIT, MODEL, Client
from tests.support.servers.hub_server import HubServer, Repository

MIB = 2**20


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small disk takes Linux and root")
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small(mini: MiniProject) -> Iterator[MiniProject]:
    """The project, with a dagster_home on a disk of 4 MiB."""
    with small_disk(mini.home, "4m"):
        yield mini


def read_only(project: MiniProject) -> None:
    """Fails with `mount point is busy` while a file there is open for writing."""
    subprocess.run(["mount", "-o", "remount,ro", str(project.home)], check=True)


def fill(project: MiniProject, room: int = 0) -> Path:
    """Fill the disk, except for `room` bytes."""
    path = project.home / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
        file.truncate(max(file.tell() - room, 0))
    return path


def left_behind(project: MiniProject) -> list[str]:
    return [path.name for path in project.store.rglob("*") if path.is_file() and path.name not in (".lock", "CURRENT")]


def big_data(project: MiniProject) -> None:
    """A data file of 6 MB."""
    project.write_rows([{**row, "output": f"{row['output']} {'x' * 500_000}"} for row in rows()])


def test_a_full_disk_is_named_and_leaves_nothing(small: MiniProject):
    big_data(small)
    with pytest.raises(StepFailed) as caught:
        make(small, "raw_dataset")
    folder = open_store(small).folder("mini", "raw_dataset")
    assert caught.value.message.startswith(f"no space left on the disk of {folder} (")
    assert "MB free); nothing was published" in caught.value.message
    assert "DAGSTER_HOME" in str(caught.value.hint)
    assert not left_behind(small)
    assert plan(small)["raw_dataset"].state == "missing"


def test_after_freeing_space_the_same_call_succeeds(small: MiniProject):
    filler = fill(small)
    with pytest.raises(StepFailed, match="no space left on the disk"):
        make(small, "raw_dataset")
    filler.unlink()
    assert not make(small, "raw_dataset").reused
    filler = fill(small)
    with pytest.raises(StepFailed, match="no space left on the disk"):
        make(small, "dataset_info")
    assert plan(small)["dataset_info"].state == "missing"
    assert make(small, "raw_dataset").reused  # needs no room
    filler.unlink()
    assert not make(small, "dataset_info").reused
    assert {plan(small)[asset].state for asset in ("raw_dataset", "dataset_info")} == {"fresh"}


@pytest.mark.parametrize("room", [4096, 8192, 12288, 16384, 24576, 32768, 49152])
def test_a_disk_that_fills_up_at_any_moment(small: MiniProject, room: int):
    make(small, "raw_dataset")
    filler = fill(small, room)
    try:
        make(small, "dataset_info")
    except StepFailed as error:
        assert "no space left on the disk" in error.message
    filler.unlink()
    make(small, "dataset_info")
    assert plan(small)["dataset_info"].state == "fresh"


def save_safetensors(folder: Path) -> None:
    import numpy
    from safetensors.numpy import save_file

    save_file({"weight": numpy.zeros(6 * MIB, dtype=numpy.uint8)}, folder / "model.safetensors")


def save_in_sqlite(folder: Path) -> None:
    import sqlite3

    with sqlite3.connect(folder / "some.sqlite") as db:
        db.execute("CREATE TABLE t (x BLOB)")
        db.execute("INSERT INTO t VALUES (zeroblob(?))", (6 * MIB,))


@pytest.mark.parametrize("save", [save_safetensors, save_in_sqlite])
def test_errors_of_libraries(small: MiniProject, save: Callable[[Path], None]):
    def body(step: Step) -> Made:
        save(step.staging)
        return Made({})

    small.empty_base()
    recipe = load_recipe(small.recipe_path())
    with pytest.raises(StepFailed, match="no space left on the disk"):
        materialise("raw_dataset", recipe, small, body, lambda event: None)
    assert not left_behind(small)


def test_a_read_only_store_is_named_and_can_still_be_read(small: MiniProject):
    make_data(small)
    small.edit(dataset={"test_size": 3})
    read_only(small)
    with pytest.raises(StepFailed) as caught:
        make(small, "dataset_info")
    folder = open_store(small).folder("mini", "dataset_info")
    assert caught.value.message == f"the disk of {folder} is read-only; nothing was published"
    assert make(small, "raw_dataset").reused
    found = make_plan(load_recipe(small.recipe_path()), small, open_store(small))
    assert (found["raw_dataset"].state, found["dataset_info"].state) == ("fresh", "stale")


def test_going_back_on_a_read_only_store(small: MiniProject):
    make_data(small)
    small.edit(dataset={"test_size": 3})
    make_data(small)
    small.edit(dataset={"test_size": 2})
    read_only(small)
    with pytest.raises(StepFailed, match="is read-only; what was published stays"):
        make(small, "dataset_info")


def finetune(project: MiniProject, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    project.empty_base()
    return subprocess.run(
        [sys.executable, "-m", "finetune_assets.cli", *arguments],
        env={**os.environ, "FINETUNE_PROJECT": str(project.root), "DAGSTER_HOME": str(project.home), **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("room", [20_000, 80_000, 140_000])
def test_a_run_on_a_full_disk_says_so(small: MiniProject, room: int):
    """There is room for the data, but not for Dagster's history."""
    fill(small, room)
    done = finetune(small, "run", "mini", "--to", "raw_dataset")
    assert done.returncode == 1, done.stderr
    assert "no space left on the disk of" in done.stderr
    assert "Traceback" not in done.stderr and "unexpected" not in done.stderr
    assert not left_behind(small)


@pytest.mark.parametrize("room", [0, 2_000_000])
def test_a_run_that_cannot_fit_is_not_begun(small: MiniProject, room: int):
    big_data(small)
    filler = fill(small, room)
    done = finetune(small, "run", "mini")
    assert done.returncode == 1 and not done.stdout
    said, hint = done.stderr.splitlines()
    assert said.startswith("not enough disk space for mini: about 12.0 MB are needed (raw_dataset 6.0 MB, dataset_info")
    assert said.endswith(f" are free on the disk of {small.store}")
    assert "finetune gc" in hint and "DAGSTER_HOME" in hint
    assert [path.name for path in small.home.iterdir() if path != filler] in ([], ["cache"]), "nothing was written"


def test_a_run_started_in_dagster_that_cannot_fit_is_not_begun(small: MiniProject):
    big_data(small)
    small.empty_base()
    job = bound(recipe_definitions(load_recipe(small.recipe_path()), small)).resolve_job_def(job_name("mini"))
    result = job.execute_in_process(raise_on_error=False)
    failures = [event.step_failure_data.user_failure_data for event in result.all_events if event.is_step_failure]
    assert failures
    for data in failures:
        assert data is not None and str(data.description).startswith("not enough disk space for mini: about 12.0 MB")
    assert not left_behind(small)


def test_a_run_on_a_read_only_disk_says_so(small: MiniProject):
    read_only(small)
    done = finetune(small, "run", "mini", "--to", "raw_dataset")
    assert done.returncode == 1, done.stderr
    assert "read-only" in done.stderr
    assert "Traceback" not in done.stderr and "unexpected" not in done.stderr
    assert finetune(small, "plan", "mini").returncode == 0


def test_a_full_disk_under_the_cache_of_the_hub(tmp_path: Path):
    repository, cache = tmp_path / "repository", tmp_path / "hf"
    repository.mkdir()
    cache.mkdir()
    (repository / "config.json").write_text("{}")
    (repository / "model.safetensors").write_bytes(bytes(6 * MIB))
    with HubServer() as hub, small_disk(cache, "4m"):
        hub.repositories[MODEL] = Repository(repository, COMMIT)
        said = Client(hub, tmp_path).fail()
        assert said.startswith(f"no space left on the disk of {cache / 'hub'} (")
        assert "set HF_HOME to a folder on a larger disk" in said
        assert not list(cache.rglob("*.incomplete"))


@pytest.mark.parametrize("cache", ["own", "shared", "small"])
def test_a_hub_s_model_that_does_not_fit_is_not_fetched(small: MiniProject, tmp_path: Path, cache: str):
    repository, elsewhere = tmp_path / "repository", tmp_path / "elsewhere"
    repository.mkdir()
    elsewhere.mkdir()
    (repository / "config.json").write_text("{}")
    (repository / "model.safetensors").write_bytes(bytes(2_000_000))
    (repository / "pytorch_model.bin").write_bytes(bytes(MIB))  # not wanted
    small.edit(model={"model_name_or_path": MODEL}, gguf={"types": ["q8_0"]})
    home = {"own": elsewhere, "shared": small.home, "small": elsewhere}[cache] / "hf"
    with ExitStack() as stack:
        hub = stack.enter_context(HubServer())
        hub.repositories[MODEL] = Repository(repository, COMMIT, parameters={"BF16": 1_000_000})
        if cache == "small":
            stack.enter_context(small_disk(elsewhere, "1m"))
        done = finetune(small, "run", "mini", HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_HUB_OFFLINE="0")
        fetched = hub.fetched()
    said, hint = done.stderr.splitlines()
    assert done.returncode == 1 and not fetched
    if cache == "small":
        assert "about 2.0 MB are needed (the download of base_model 2.0 MB), and " in said
        assert said.endswith(f" are free on the disk of {home / 'hub'}")
        assert hint.startswith("set HF_HOME")
        return
    # kept: base, merged, q8_0; the download where it lies on the same disk; bf16 to quantise from meanwhile
    assert f"about {'9.1' if cache == 'shared' else '7.1'} MB are needed (raw_dataset " in said
    assert "base_model 2.0 MB, merged_model 2.0 MB, gguf_file 1.1 MB, " in said
    assert "temporary files 2.0 MB), and " in said
    assert ("the download of base_model 2.0 MB" in said) == (cache == "shared")
    assert "DAGSTER_HOME" in hint
