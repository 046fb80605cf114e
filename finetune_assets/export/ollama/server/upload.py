"""Upload of weights to an Ollama server that does not have them yet.

The server stores a file by its sha256 and refuses one with a different digest. It writes to a temporary file until
the last byte arrives, so an interrupted upload leaves nothing. An upload cannot be resumed, because /api/blobs supports
only HEAD (does it exist?) and POST (the complete file), so it restarts from the beginning.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_assets.export.ollama.server.api import answers
from finetune_assets.reporting.errors import FinetuneError, StepFailed
from finetune_assets.reporting.events import Progress, StepProgress, message

if TYPE_CHECKING:
    import httpx


BLOCK = 1 << 20
ATTEMPTS = 3
PAUSE = 1.0  # seconds before the next attempt
PATIENCE = 600.0  # seconds without any data; a slow disk delays the answer to a large file's last byte
EVERY = 0.5  # seconds between two reports


def send(host: str, file: Path, sha256: str, progress: Progress) -> None:
    """Make sure that the server has the file.

    Args:
        sha256: the file's recorded digest (hex), which the server checks.

    Raises:
        StepFailed: the server refuses the file.
        httpx.HTTPError: the connection was lost in every attempt, or the server is gone.
    """
    import httpx

    with httpx.Client(base_url=host, timeout=PATIENCE, trust_env=False) as client:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return _send(client, host, file, sha256, progress)
            except httpx.TransportError as error:
                if attempt == ATTEMPTS or not _is_there(host):
                    raise
                progress(message(f"the connection was lost ({error}): sending again"))
                time.sleep(PAUSE)


def _send(client: httpx.Client, host: str, file: Path, sha256: str, progress: Progress) -> None:
    from ollama import ResponseError

    place, size = f"/api/blobs/sha256:{sha256}", file.stat().st_size
    if client.head(place).is_success:
        return
    progress(message(f"sending {file.name}, {size / 1e6:.1f} MB"))
    answer = client.post(place, content=_reported(file, size, progress), headers={"Content-Length": str(size)})
    if answer.is_error:
        reason = ResponseError(answer.text or answer.reason_phrase).error
        raise StepFailed(
            f"the Ollama server at {host} refused {file.name}: HTTP {answer.status_code}: {reason[:200]}",
            "what it served before is unchanged; check its free disk space, then run again",
        )


def _reported(file: Path, size: int, progress: Progress) -> Iterator[bytes]:
    """Yield the bytes of a file, and report the megabytes sent at intervals."""
    total = max(1, round(size / 1e6))
    began = last = time.monotonic()
    done = 0
    with file.open("rb") as source:
        while block := source.read(BLOCK):
            yield block
            done += len(block)
            now = time.monotonic()
            if now - last >= EVERY or done == size:
                last = now
                left = (now - began) / done * (size - done)
                progress(StepProgress(step=round(total * done / size), steps=total, seconds_left=left))


def _is_there(host: str) -> bool:
    try:
        return answers(host) is not None
    except FinetuneError:
        return False
