"""One computation at a time on a device, whoever computes; and nothing stays taken by the dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune_assets.reporting.errors import StepFailed
from resources import gpu
from resources.gpu import GpuResource, devices
from tests.conftest import REPOSITORY
from tests.support.events import json_into

HOLDER = """
import time
from resources.gpu import GpuResource
with GpuResource(device="cpu").lease(print):
    print("held", flush=True)
    time.sleep(60)
"""
# speaks Dagster Pipes by hand, and ignores that it is to end
WORKER = """
import base64, json, os, signal, time, zlib
signal.signal(signal.SIGTERM, signal.SIG_IGN)
where = json.loads(zlib.decompress(base64.b64decode(os.environ["DAGSTER_PIPES_MESSAGES"])))
with open(where["path"], "a") as messages:
    params = {"payload": {"event": "message", "text": "works"}}
    event = {"__dagster_pipes_version": "0.1", "method": "report_custom_message", "params": params}
    print(json.dumps(event), file=messages)
    messages.flush()
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(gpu.tempfile, "tempdir", None)  # computed again from TMPDIR
    monkeypatch.setattr(gpu, "POLL_SECONDS", 0.02)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def hold(program: str = HOLDER, says: str = "held") -> subprocess.Popen[str]:
    """Another process that holds the CPU, as it has just said."""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert process.stdout is not None and process.stdout.readline() == f"{says}\n"
    return process


def seconds_to_get_it(told: list[dict]) -> float:
    began = time.monotonic()
    with GpuResource(device="cpu").lease(json_into(told)):
        return time.monotonic() - began


def test_another_process_waits_and_is_told_for_whom():
    other = hold()
    told: list[dict] = []
    timer = time.monotonic()
    os.kill(other.pid, signal.SIGSTOP)  # it does not let go, so long as it lives
    child = os.fork()
    if child == 0:
        time.sleep(0.5)
        os.kill(other.pid, signal.SIGKILL)
        os._exit(0)
    waited = seconds_to_get_it(told)
    os.waitpid(child, 0)
    other.wait()
    assert waited >= 0.4 and time.monotonic() - timer < 20
    assert told == [{"event": "message", "text": f"waits for the cpu (held by process {other.pid})"}]


def test_a_killed_holder_holds_no_more():
    other = hold()
    other.kill()
    other.wait()
    told: list[dict] = []
    seconds_to_get_it(told)
    assert told == []


def test_a_device_is_free_only_when_the_worker_of_a_killed_run_has_gone(tmp_path: Path):
    """The guard gives a stubborn worker its grace; until then the device's memory is in use."""
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    launcher = (
        "import sys\nfrom finetune_assets.worker import launch\nfrom resources.gpu import GpuResource\n"
        "from finetune_assets.recipe import ModelSection\n"
        "from finetune_assets.worker.tasks.task import Task\n"
        "task = Task(task='train', out='.', model=ModelSection(model_name_or_path='org/tiny'))\n"
        "with GpuResource(device='cpu').lease(print) as lease:\n"
        f"    launch.run(task, lambda event: print('works', flush=True), held=[lease.lock],\n"
        f"               worker=[sys.executable, '-S', {str(tmp_path / 'worker.py')!r}], grace_seconds=1.0)\n"
    )
    other = hold(launcher, says="works")
    other.kill()
    other.wait()
    told: list[dict] = []
    assert seconds_to_get_it(told) > 0.5
    assert told == [{"event": "message", "text": f"waits for the cpu (held by process {other.pid})"}]


def test_an_exception_lets_go():
    with pytest.raises(KeyboardInterrupt), GpuResource(device="cpu").lease(print):
        raise KeyboardInterrupt
    told: list[dict] = []
    seconds_to_get_it(told)
    assert told == []


def test_each_of_several_gpus_is_given_to_one_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-ab12")
    told: list[dict] = []
    with GpuResource().lease(json_into(told)) as first, GpuResource().lease(json_into(told)) as second:
        assert [dict(first.environment), dict(second.environment)] == [
            {"CUDA_VISIBLE_DEVICES": "2"},
            {"CUDA_VISIBLE_DEVICES": "GPU-ab12"},
        ]
    assert told == []


def test_hidden_gpus_are_not_given_away(monkeypatch: pytest.MonkeyPatch):
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert devices("auto") == {"device": {}}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert devices("cpu") == {"cpu": {}}


def test_a_folder_of_somebody_else_is_not_trusted(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"finetune-assets-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StepFailed, match="belongs to another user"):
        gpu.lock_folder()
