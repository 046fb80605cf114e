"""A throw-away Ollama server on a free loopback port, for tests and for `finetune chat` where none is running."""

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

GRACE = 10.0  # seconds between asking a server to stop and killing it


def find_binary() -> Path | None:
    """Return the Ollama binary: OLLAMA_BIN, else `ollama` on the PATH."""
    found = shutil.which(Path(os.environ.get("OLLAMA_BIN") or "ollama").expanduser())
    return Path(found) if found else None


@contextmanager
def serving(models: Path, *, binary: Path | None = None, wait: float = 60.0) -> Iterator[str]:
    """Run a server over the model store `models`; yields its address, http://127.0.0.1:PORT.

    It has a home folder of its own, keeps what it finds in the store, and ends, with whatever it started, at the end.

    Raises:
        StepFailed: there is no Ollama here, or the server does not answer within `wait` seconds.
    """
    binary = binary or find_binary()
    if binary is None:
        raise StepFailed("there is no Ollama here", "install it (https://ollama.com) or set OLLAMA_BIN to its binary")
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ollama-home-", ignore_cleanup_errors=True) as home:
        address = f"127.0.0.1:{free_port()}"
        ours = {
            "OLLAMA_HOST": address,
            "OLLAMA_MODELS": str(models.resolve()),
            "OLLAMA_NOPRUNE": "1",  # a blob without a manifest may belong to a model that is being written
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
                start_new_session=True,  # its runners are in its process group, and none of ours is
            )
        try:
            _wait(server, f"http://{address}", log, wait)
            yield f"http://{address}"
        finally:
            _stop(server)


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
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
    raise StepFailed(f"the Ollama server {what}: {tail or 'no output'}", "try `ollama serve` by hand")


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
