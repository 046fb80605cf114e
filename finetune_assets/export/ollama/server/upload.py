"""Weights sent to an Ollama server, unless it has them.

The server stores a file by its sha256 and refuses one that does not have it. It writes to a file of its own until the
last byte has come, so that a broken-off upload leaves nothing; nor can it be resumed: /api/blobs knows HEAD (is it
there?) and POST (all of it). It is sent again from the start.
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
PATIENCE = 600.0  # seconds without a sign of life; a slow disk takes its time over a large file's last byte
EVERY = 0.5  # seconds between two reports


def send(host: str, file: Path, sha256: str, progress: Progress) -> None:
    """Make sure that the server has the file.

    Args:
        sha256: of the file (hex), as on record; the server checks it.

    Raises:
        StepFailed: the server refuses the file.
        httpx.HTTPError: the connection was lost, in each of several attempts or for good.
    """
    import httpx

    with httpx.Client(base_url=host, timeout=PATIENCE, trust_env=False) as client:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return _send(client, host, file, sha256, progress)
            except httpx.TransportError as error:
                if attempt == ATTEMPTS or not _is_there(host):
                    raise
                progress(message(f"the connection broke off ({error}): sending again"))
                time.sleep(PAUSE)


def _send(client: httpx.Client, host: str, file: Path, sha256: str, progress: Progress) -> None:
    from ollama import ResponseError

    place, size = f"/api/blobs/sha256:{sha256}", file.stat().st_size
    if client.head(place).is_success:
        return
    progress(message(f"sending {file.name}, {size / 1e6:.1f} MB"))
    answer = client.post(place, content=_reported(file, size, progress), headers={"Content-Length": str(size)})
    if answer.is_error:
        said = ResponseError(answer.text or answer.reason_phrase).error
        raise StepFailed(
            f"the Ollama server at {host} did not take {file.name}: {answer.status_code}: {said[:200]}",
            "what it served before is unchanged; see that it has room on its disk, and run again",
        )


def _reported(file: Path, size: int, progress: Progress) -> Iterator[bytes]:
    """Yield the bytes of a file, and a report now and then of the megabytes sent."""
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
