"""The child process: what it says arrives, what goes wrong is explained, and nothing of it is ever left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune_assets.errors import BadInput, StepFailed
from finetune_assets.training import launch

HEAD = """
import json, os, signal, subprocess, sys, time
job = json.load(open(sys.argv[1]))
events = os.fdopen(int(sys.argv[3]), "w")
def send(**event):
    events.write(json.dumps(event) + "\\n"); events.flush()
"""
SLEEPER = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]


@pytest.fixture
def worker(tmp_path: Path):
    """Makes a worker command of a few lines of Python."""

    def make(body: str) -> list[str]:
        script = tmp_path / "worker.py"
        script.write_text(HEAD + textwrap.dedent(body), encoding="utf-8")
        return [sys.executable, "-S", str(script)]

    return make


def gone(pid: int, seconds: float = 5) -> bool:
    """True once the process has ended (a zombie has)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_events_and_report_arrive_whatever_is_printed(worker) -> None:
    command = worker("""
        print("noise on stdout", flush=True)
        os.write(2, b"noise \\xff on stderr\\n")
        send(event="step", step=1, loss=2.5)
        send(event="message", text=job["word"])
        send(event="done", report={"rows": 3})
    """)
    seen: list[dict[str, Any]] = []
    assert launch.run({"word": "米赞"}, seen.append, worker=command) == {"rows": 3}
    assert seen == [{"event": "step", "step": 1, "loss": 2.5}, {"event": "message", "text": "米赞"}]


def test_a_job_larger_than_a_pipe_arrives(worker) -> None:
    command = worker('send(event="done", report={"n": len(job["long"])})')
    assert launch.run({"long": "x" * 300_000}, print, worker=command) == {"n": 300_000}


@pytest.mark.parametrize(("kind", "expected"), [("BadInput", BadInput), ("StepFailed", StepFailed)])
def test_errors_cross_over(worker, kind: str, expected: type[Exception]) -> None:
    command = worker(f'send(event="error", kind="{kind}", message="rank is odd", hint="make it even"); sys.exit(1)')
    with pytest.raises(expected, match="rank is odd") as caught:
        launch.run({}, print, worker=command)
    assert caught.value.hint == "make it even"  # pyright: ignore[reportAttributeAccessIssue]


def test_a_killed_worker_is_explained_by_memory(worker) -> None:
    with pytest.raises(StepFailed, match=r"SIGKILL.*memory runs out") as caught:
        launch.run({}, print, worker=worker("os.kill(os.getpid(), signal.SIGKILL)"))
    assert "per_device_train_batch_size" in str(caught.value.hint)


def test_a_crash_shows_its_last_words(worker) -> None:
    with pytest.raises(StepFailed, match=r"(?s)exit code 1 .*ZeroDivisionError"):
        launch.run({}, print, worker=worker("1 / 0"))
    with pytest.raises(StepFailed, match="SIGABRT"):
        launch.run({}, print, worker=worker("os.abort()"))


def test_an_end_without_a_report_is_no_success(worker) -> None:
    with pytest.raises(StepFailed, match="exit code 0"):
        launch.run({}, print, worker=worker("pass"))


STUBBORN = f"""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen({SLEEPER!r})
    send(event="message", pids=[os.getpid(), child.pid])
    time.sleep(60)
"""


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_any_exception_ends_the_whole_group_even_a_stubborn_one(worker, error: type[BaseException]) -> None:
    pids: list[int] = []

    def progress(event: dict[str, Any]) -> None:
        pids.extend(event["pids"])
        raise error

    began = time.monotonic()
    with pytest.raises(error):
        launch.run({}, progress, worker=worker(STUBBORN), grace_seconds=0.3)
    assert time.monotonic() - began < 5
    assert len(pids) == 2 and all(gone(pid) for pid in pids)


def test_term_comes_first_so_that_a_worker_can_put_its_things_away(worker, tmp_path: Path) -> None:
    command = worker(f"""
        def bye(*_):
            open({str(tmp_path / "tidied")!r}, "w").close(); sys.exit(0)
        signal.signal(signal.SIGTERM, bye)
        send(event="message")
        time.sleep(60)
    """)

    def progress(event: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch.run({}, progress, worker=command, grace_seconds=10)
    assert (tmp_path / "tidied").exists()


def test_helpers_left_by_a_finished_worker_are_ended(worker) -> None:
    command = worker(f"""
        child = subprocess.Popen({SLEEPER!r})
        send(event="message", pid=child.pid)
        send(event="done", report={{}})
    """)
    seen: list[dict[str, Any]] = []
    launch.run({}, seen.append, worker=command)
    assert gone(seen[0]["pid"])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("victim", ["launcher", "guard"])
def test_nothing_outlives_launcher_or_guard(worker, tmp_path: Path, how: int, victim: str) -> None:
    if victim == "guard" and sys.platform != "linux" and how == signal.SIGKILL:
        pytest.skip("a killed guard is noticed through Linux's parent-death signal only")
    command = worker(STUBBORN)
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import sys\nfrom finetune_assets.training import launch\n"
        f"launch.run({{}}, lambda event: print(*event['pids'], flush=True), worker={command!r}, grace_seconds=0.3)\n",
        encoding="utf-8",
    )
    process = subprocess.Popen(
        [sys.executable, str(launcher)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(launch.__file__).parents[2])},
    )  # fmt: skip
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    guard = psutil.Process(pids[0]).ppid()
    os.kill(process.pid if victim == "launcher" else guard, how)
    assert gone(pids[0]) and gone(guard)
    if not (victim == "guard" and how == signal.SIGKILL):  # then only the worker itself is told
        assert gone(pids[1])
    else:
        os.kill(pids[1], signal.SIGKILL)
    process.stdout.close()
    process.wait(10)


def test_a_terminals_ctrl_c_does_not_reach_the_worker_by_itself(worker) -> None:
    command = worker("""
        send(event="message", session=os.getsid(0), group=os.getpgid(0), pid=os.getpid())
        send(event="done", report={})
    """)
    seen: list[dict[str, Any]] = []
    launch.run({}, seen.append, worker=command)
    assert seen[0]["session"] != os.getsid(0) and seen[0]["group"] == seen[0]["pid"]


def test_it_works_in_a_thread_and_leaks_no_descriptors(worker) -> None:
    command = worker('send(event="done", report={"ok": 1})')
    results: list[dict[str, Any]] = []
    launch.run({}, print, worker=command)
    before = psutil.Process().num_fds()
    thread = threading.Thread(target=lambda: results.append(launch.run({}, print, worker=command)))
    thread.start()
    thread.join(20)
    assert results == [{"ok": 1}] and psutil.Process().num_fds() == before


def test_the_real_worker_keeps_its_event_stream_clean(tmp_path: Path) -> None:
    """Without --events-fd the events go to standard output; a bad section is one error line there."""
    job = tmp_path / "job.json"
    job.write_text('{"device": "vax"}', encoding="utf-8")
    body = (
        "import sys; from finetune_assets.training import worker\n"
        "def work(job, progress):\n"
        "    print('noise'); progress({'event': 'message', 'text': job['device']})\n"
        "    raise worker.StepFailed('no', 'yes')\n"
        "worker.work, worker.quieten = work, lambda: None\n"
        f"sys.exit(worker.main([{str(job)!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "noise" in done.stderr
    assert done.stdout.splitlines() == [
        '{"event": "message", "text": "vax"}',
        '{"event": "error", "kind": "StepFailed", "message": "no", "hint": "yes"}',
    ]
