"""A temporary Ollama server on a free loopback port, for tests, and for `finetune chat` if no server is running."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_assets.export.ollama.server.api import answers
from finetune_assets.machine import child_environment
from finetune_assets.reporting.errors import StepFailed

GRACE = 10.0  # seconds between SIGTERM and SIGKILL


def find_binary() -> Path | None:
    """Return the Ollama binary: OLLAMA_BIN, else `ollama` on the PATH."""
    binary = shutil.which(Path(os.environ.get("OLLAMA_BIN") or "ollama").expanduser())
    return Path(binary) if binary else None


@contextmanager
def serving(models: Path, *, binary: Path | None = None, wait: float = 60.0) -> Iterator[str]:
    """Run a server on the model store `models`, and yield its address, http://127.0.0.1:PORT.

    It has its own home folder and deletes nothing from the store. At the end it stops, with all its processes.

    Raises:
        StepFailed: Ollama is not installed, or the server does not answer within `wait` seconds.
    """
    binary = binary or find_binary()
    if binary is None:
        raise StepFailed("Ollama is not installed", "install it (https://ollama.com) or set OLLAMA_BIN to its binary")
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ollama-home-", ignore_cleanup_errors=True) as home:
        address = f"127.0.0.1:{free_port()}"
        ours = {
            "OLLAMA_HOST": address,
            "OLLAMA_MODELS": str(models.resolve()),
            "OLLAMA_NOPRUNE": "1",  # a blob without a manifest may belong to an unfinished model
            "OLLAMA_NUM_PARALLEL": "1",
            "HOME": home,
        }
        log = Path(home) / "server.log"
        with log.open("wb") as output:
            server = subprocess.Popen(
                [str(binary), "serve"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=child_environment.for_ollama() | ours,
                start_new_session=True,  # a group of its own: its runners end with it, and this process does not
            )
        try:
            _wait(server, f"http://{address}", log, wait)
            yield f"http://{address}"
        finally:
            _stop(server)


def free_port() -> int:
    """Return a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(server: subprocess.Popen[bytes], host: str, log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < deadline:
        if answers(host) is not None:
            return
        time.sleep(0.1)
    tail = " / ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
    what = "does not answer" if server.poll() is None else f"ended with exit code {server.returncode}"
    raise StepFailed(f"the Ollama server {what}: {tail or 'no output'}", "run `ollama serve` yourself to see why")


def _stop(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            break
        try:
            server.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    server.wait()
