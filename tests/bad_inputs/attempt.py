"""One command line in a child of this process, watched from outside."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

from rich.console import Console

from tests.bad_inputs.case import ADDRESS_SPACE, SECONDS, Answer, Case
from tests.bad_inputs.changes import base_folder
from tests.conftest import make_mini


def attempt(case: Case, scratch: Path) -> Answer:
    """Do what a case says in a project of its own, in a child of this process, which has everything imported."""
    root = scratch / "project"
    make_mini(scratch)
    base_folder(root)
    before = dict(os.environ)
    case.change(root)
    log = scratch / "output"
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            handle = os.open(log, os.O_CREAT | os.O_WRONLY)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.environ.update(
                {
                    "FINETUNE_PROJECT": str(root),
                    "DAGSTER_HOME": str(root / "dagster_home"),
                    "TERM": "dumb",
                    **case.environment,
                }
            )
            os.chdir(root)
            code = _main(case.command)
        finally:
            os._exit(code)
    status: int | None = None
    memory = 0
    while status is None and time.monotonic() - began < SECONDS + 2:
        done, ended, used = os.wait4(child, os.WNOHANG)
        if done:
            status, memory = ended, used.ru_maxrss * 1024
        else:
            time.sleep(0.01)
    seconds = time.monotonic() - began
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    os.environ.clear()
    os.environ.update(before)
    text = log.read_bytes().decode(errors="replace") if log.exists() else ""
    code = None if status is None else os.waitstatus_to_exitcode(status)
    return Answer(code, text, seconds, memory)


def _main(command: tuple[str, ...]) -> int:
    from finetune_assets.cli import commands as cli

    cli.out, cli.err = Console(width=200), Console(stderr=True, width=200)
    sys.argv = ["finetune", *command]
    try:
        cli.main()
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()


def warm() -> None:
    """Import once what every command would."""
    import dagster

    from finetune_assets.assets.automation import chain, run
    from finetune_assets.cli import commands, live

    assert dagster and chain and run and commands and live
