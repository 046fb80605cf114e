"""The child process: what it says arrives, what goes wrong is explained, and nothing of it is ever left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from dagster_pipes import encode_param

from finetune_assets.recipe import ModelSection
from finetune_assets.reporting.errors import BadInput, StepFailed
from finetune_assets.reporting.events import Event
from finetune_assets.worker import launch
from finetune_assets.worker.tasks.task import Task
from finetune_assets.worker.tasks.train import Train
from tests.support.events import json_into

# Dagster Pipes as it is spoken, word for word: no import, so that a worker starts in no time.
HEAD = """
import base64, json, os, signal, subprocess, sys, time, zlib
def place(name):
    return json.loads(zlib.decompress(base64.b64decode(os.environ[name])))["path"]
context = json.load(open(place("DAGSTER_PIPES_CONTEXT")))
job = context["extras"]["job"]
messages = open(place("DAGSTER_PIPES_MESSAGES"), "w")
def say(method, **params):
    message = {"__dagster_pipes_version": "0.1", "method": method, "params": params}
    messages.write(json.dumps(message) + "\\n"); messages.flush()
def send(**event):
    say("report_custom_message", payload=event)
"""


class Toy(Task, frozen=True):
    """A task for workers of a few lines."""

    less_memory: ClassVar[str] = Train.less_memory
    word: str = ""


TASK = Toy(task="train", out=Path("out"), model=ModelSection(model_name_or_path="org/tiny"))
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
        send(event="step", step=1, steps=4, loss=2.5)
        send(event="message", text=job["word"])
        send(event="done", report={"rows": 3})
    """)
    seen: list[dict[str, Any]] = []
    assert launch.run(TASK.model_copy(update={"word": "米赞"}), json_into(seen), worker=command) == {"rows": 3}
    assert seen == [{"event": "step", "step": 1, "steps": 4, "loss": 2.5}, {"event": "message", "text": "米赞"}]


def test_what_is_no_event_of_ours_is_passed_on_in_its_place(worker) -> None:
    command = worker("""
        say("opened", extras={})
        send(event="message", text="first")
        say("log", message="second", level="INFO")
        send(event="done", report={})
        say("closed")
    """)
    seen: list[str] = []
    launch.run(
        TASK,
        lambda event: seen.append(event.as_json()["text"]),
        on_message=lambda message: seen.append(message["method"]),
        worker=command,
    )
    assert seen == ["opened", "first", "log", "closed"]


def test_the_environment_and_the_run_reach_the_worker(worker) -> None:
    command = worker("""
        send(event="done", report=[os.environ["SHOWN"], "PATH" in os.environ, context["run_id"], context["extras"]])
    """)
    context = {**launch.NO_RUN, "run_id": "r1", "extras": {"colour": "blue"}}
    report = launch.run(TASK, print, env={"SHOWN": "1"}, context=context, worker=command)  # pyright: ignore[reportArgumentType]
    assert report == ["1", True, "r1", {"colour": "blue", "job": TASK.model_dump(mode="json")}]


def test_a_line_that_a_dying_worker_did_not_finish_is_left_out(worker) -> None:
    command = worker("""
        send(event="message", text="whole")
        messages.write('{"__dagster_pipes_version": "0.1", "method": "report_cus'); messages.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    seen: list[dict[str, Any]] = []
    with pytest.raises(StepFailed, match="SIGKILL"):
        launch.run(TASK, json_into(seen), worker=command)
    assert seen == [{"event": "message", "text": "whole"}]


def test_a_worker_that_has_said_all_and_does_not_end_is_ended(worker) -> None:
    command = worker("""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        send(event="message", text=str(os.getpid()))
        send(event="done", report={"rows": 3})
        say("closed")
        time.sleep(60)
    """)
    seen: list[dict[str, Any]] = []
    began = time.monotonic()
    assert launch.run(TASK, json_into(seen), worker=command, grace_seconds=0.3) == {"rows": 3}
    assert time.monotonic() - began < 5 and gone(int(seen[0]["text"]))


def test_a_job_larger_than_a_pipe_arrives(worker) -> None:
    command = worker('send(event="done", report={"n": len(job["word"])})')
    assert launch.run(TASK.model_copy(update={"word": "x" * 300_000}), print, worker=command) == {"n": 300_000}


@pytest.mark.parametrize(("kind", "expected"), [("BadInput", BadInput), ("StepFailed", StepFailed)])
def test_errors_cross_over(worker, kind: str, expected: type[Exception]) -> None:
    command = worker(f'send(event="error", kind="{kind}", message="rank is odd", hint="make it even"); sys.exit(1)')
    with pytest.raises(expected, match="rank is odd") as caught:
        launch.run(TASK, print, worker=command)
    assert caught.value.hint == "make it even"  # pyright: ignore[reportAttributeAccessIssue]


def test_a_killed_worker_is_explained_by_memory(worker) -> None:
    with pytest.raises(StepFailed, match=r"SIGKILL.*memory runs out") as caught:
        launch.run(TASK, print, worker=worker("os.kill(os.getpid(), signal.SIGKILL)"))
    assert "per_device_train_batch_size" in str(caught.value.hint)


def test_a_crash_shows_its_last_words(worker) -> None:
    with pytest.raises(StepFailed, match=r"(?s)exit code 1 .*ZeroDivisionError"):
        launch.run(TASK, print, worker=worker("1 / 0"))
    with pytest.raises(StepFailed, match="SIGABRT"):
        launch.run(TASK, print, worker=worker("os.abort()"))


def test_an_end_without_a_report_is_no_success(worker) -> None:
    with pytest.raises(StepFailed, match="exit code 0"):
        launch.run(TASK, print, worker=worker("pass"))


STUBBORN = f"""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen({SLEEPER!r})
    send(event="message", text=f"{{os.getpid()}} {{child.pid}}")
    time.sleep(60)
"""


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_any_exception_ends_the_whole_group_even_a_stubborn_one(worker, error: type[BaseException]) -> None:
    pids: list[int] = []

    def progress(event: Event) -> None:
        pids.extend(int(pid) for pid in event.as_json()["text"].split())
        raise error

    began = time.monotonic()
    with pytest.raises(error):
        launch.run(TASK, progress, worker=worker(STUBBORN), grace_seconds=0.3)
    assert time.monotonic() - began < 5
    assert len(pids) == 2 and all(gone(pid) for pid in pids)


def test_term_comes_first_so_that_a_worker_can_put_its_things_away(worker, tmp_path: Path) -> None:
    command = worker(f"""
        def bye(*_):
            open({str(tmp_path / "tidied")!r}, "w").close(); sys.exit(0)
        signal.signal(signal.SIGTERM, bye)
        send(event="message", text="ready")
        time.sleep(60)
    """)

    def progress(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch.run(TASK, progress, worker=command, grace_seconds=10)
    assert (tmp_path / "tidied").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process adopt orphans")
@pytest.mark.parametrize("cancelled", [True, False])
def test_what_has_left_the_group_is_ended_too(worker, cancelled: bool) -> None:
    command = worker(f"""
        child = subprocess.Popen({SLEEPER!r}, start_new_session=True)
        send(event="message", text=str(child.pid))
        send(event="done", report={{}})
    """)
    pids: list[int] = []

    def progress(event: Event) -> None:
        pids.append(int(event.as_json()["text"]))
        if cancelled:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        launch.run(TASK, progress, worker=command, grace_seconds=0.3)
    assert gone(pids[0])


def test_helpers_left_by_a_finished_worker_are_ended(worker) -> None:
    command = worker(f"""
        child = subprocess.Popen({SLEEPER!r})
        send(event="message", text=str(child.pid))
        send(event="done", report={{}})
    """)
    seen: list[dict[str, Any]] = []
    launch.run(TASK, json_into(seen), worker=command)
    assert gone(int(seen[0]["text"]))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("victim", ["launcher", "guard"])
def test_nothing_outlives_launcher_or_guard(worker, tmp_path: Path, how: int, victim: str) -> None:
    if victim == "guard" and sys.platform != "linux" and how == signal.SIGKILL:
        pytest.skip("a killed guard is noticed through Linux's parent-death signal only")
    command = worker(STUBBORN)
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import sys\nfrom finetune_assets.worker import launch\n"
        f"worker = {command!r}\n"
        "from finetune_assets.recipe import ModelSection\n"
        "from finetune_assets.worker.tasks.task import Task\n"
        "task = Task(task='train', out='.', model=ModelSection(model_name_or_path='org/tiny'))\n"
        "show = lambda event: print(event.text, flush=True)\n"
        "launch.run(task, show, worker=worker, grace_seconds=0.3)\n",
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
        send(event="message", text=json.dumps({"session": os.getsid(0), "group": os.getpgid(0), "pid": os.getpid()}))
        send(event="done", report={})
    """)
    seen: list[dict[str, Any]] = []
    launch.run(TASK, json_into(seen), worker=command)
    ids = json.loads(seen[0]["text"])
    assert ids["session"] != os.getsid(0) and ids["group"] == ids["pid"]


def test_it_works_in_a_thread_and_leaks_no_descriptors(worker) -> None:
    command = worker('send(event="done", report={"ok": 1})')
    results: list[dict[str, Any]] = []
    launch.run(TASK, print, worker=command)
    before = psutil.Process().num_fds()
    thread = threading.Thread(target=lambda: results.append(launch.run(TASK, print, worker=command)))
    thread.start()
    thread.join(20)
    assert results == [{"ok": 1}] and psutil.Process().num_fds() == before


def test_another_pipes_client_can_start_the_real_worker(tmp_path: Path) -> None:
    """With places of Dagster's own choosing, noise and all; what the caller cannot put right is told with its stack."""
    messages = tmp_path / "messages"
    job: dict[str, Any] = {"task": "train", "out": str(tmp_path), "device": "vax"}
    job |= {"base": "base", "rows": "rows", "validation": None, "vocabulary": None, "train": {}}
    job |= {"model": {"model_name_or_path": "org/tiny"}}
    messages.touch()
    body = (
        "import sys; from finetune_assets.worker import __main__ as worker\n"
        "from finetune_assets.reporting.errors import BadInput\n"
        "from finetune_assets.reporting.events import message\n"
        "from finetune_assets.worker.tasks.train import Train\n"
        "def run(task, progress):\n"
        "    print('noise'); progress(message(task.device))\n"
        "    raise BadInput('no', 'yes') if task.device == 'vax' else ZeroDivisionError\n"
        "Train.run = run\n"
        "sys.exit(worker.main())\n"
    )

    def start(job: dict[str, Any]) -> tuple[int, list[tuple[str, Any]]]:
        places = {
            "DAGSTER_PIPES_CONTEXT": {"data": {**launch.NO_RUN, "extras": {"job": job}}},
            "DAGSTER_PIPES_MESSAGES": {"path": str(messages)},
        }
        environment = {**os.environ, **{name: encode_param(place) for name, place in places.items()}}
        done = subprocess.run([sys.executable, "-c", body], env=environment, timeout=60)
        said = [json.loads(line) for line in messages.read_text().splitlines()]
        messages.write_text("")
        return done.returncode, [(message["method"], message["params"]) for message in said]

    event = {"event": "message", "text": "vax"}
    error = {"event": "error", "kind": "BadInput", "message": "no", "hint": "yes"}
    assert start(job) == (
        2,
        [
            ("opened", {"extras": {}}),
            ("report_custom_message", {"payload": event}),
            ("report_custom_message", {"payload": error}),
            ("closed", {}),
        ],
    )
    code, said = start({**job, "device": "cpu"})
    (stack,) = [params["message"] for method, params in said if method == "log"]
    assert "Traceback" in stack and stack.endswith("ZeroDivisionError\n")
    told = said[-2][1]["payload"]
    assert code == 1 and said[-1][0] == "closed" and "failed unexpectedly: ZeroDivisionError" in told["message"]
    code, said = start({"task": "train"})
    assert (code, [method for method, _ in said]) == (1, ["opened", "report_custom_message", "closed"])
    assert "received an invalid task: train: out: Field required" in said[1][1]["payload"]["message"]


def test_a_message_that_is_not_an_event_fails_the_step(worker) -> None:
    with pytest.raises(StepFailed, match="sent an invalid message: step: steps: Field required"):
        launch.run(TASK, print, worker=worker('send(event="step", step=1)'))
