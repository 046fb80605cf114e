"""Downloads of base models from a Hugging Face hub, pinned to a commit, into the hub's own cache."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetune_assets.machine.disk import disk_trouble
from finetune_assets.reporting.causes import causes
from finetune_assets.reporting.errors import FinetuneError, StepFailed
from finetune_assets.reporting.events import Progress, message

COMMIT = re.compile(r"[0-9a-f]{40}")
REPORT_EVERY = 5.0  # seconds between two messages about the bytes received
TOKEN_HINT = "check model.model_name_or_path and model.model_revision; a private model needs HF_TOKEN"


@dataclass(frozen=True)
class Announced:
    """The size of a model, as a hub reports it before the download.

    Args:
        bytes: size of the files to fetch.
        missing: size of those files that are not in the cache yet.
        weights: elements by dtype (safetensors' names); empty if the hub does not know.
        cache: the folder that receives the files.
    """

    bytes: int
    missing: int
    weights: Counter[str]
    cache: Path


def announced(repo_id: str, revision: str, wanted: Callable[[str], bool]) -> Announced | None:
    """Return the size of a model on the hub; None if the hub does not report it: the download will explain why."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    try:
        info = HfApi().model_info(
            repo_id, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except Exception:  # also any error of the hub's HTTP library
        return None
    files = {
        file.rfilename: file.size or 0
        for file in info.siblings or []
        if "/" not in file.rfilename and wanted(file.rfilename)
    }
    cached = [name for name in files if isinstance(try_to_load_from_cache(repo_id, name, revision=info.sha), str)]
    return Announced(
        bytes=sum(files.values()),
        missing=sum(files.values()) - sum(files[name] for name in cached),
        weights=Counter(info.safetensors.parameters if info.safetensors else {}),
        cache=Path(constants.HF_HUB_CACHE),
    )


def download(
    repo_id: str,
    revision: str,
    patterns: Sequence[str],
    but: Sequence[str],
    progress: Progress,
) -> tuple[Path, str]:
    """Download a model; return its folder in the hub's cache, and the commit of the revision.

    Folders inside the repository are left out: they hold the model in other formats. Files in the cache are not
    fetched again, so an interrupted download continues. A file whose connection broke continues where it broke.
    With a commit as revision and all files in the cache, no network is needed.

    Args:
        patterns: names of the files to fetch.
        but: names among them to leave out.

    Raises:
        StepFailed: the files cannot be downloaded.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        commit = revision
        if not COMMIT.fullmatch(revision):
            # without a timeout the library never gives up
            commit = HfApi().model_info(repo_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha
            assert commit is not None
        text = f"downloading {repo_id} at {commit}"
        progress(message(text))
        fetch = partial(
            snapshot_download,
            repo_id,
            revision=commit,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*", *but],
        )
        return _run(fetch, lambda count: progress(message(f"{text}: {count / 1e6:.0f} MB so far"))), commit
    except Exception as error:  # also any error of the hub's HTTP library
        raise _explained(error, f"{repo_id} (revision {revision})") from error


def _run(fetch: Callable[..., str], report: Callable[[int], None]) -> Path:
    """Run a download in a thread, and report the bytes received every few seconds.

    The library would finish its current files before it reacts to an interrupt; here they end with the next piece.
    """
    counts: dict[int, int] = {}
    stop = threading.Event()
    bar = _byte_counter(counts, stop)
    result: Future[str] = Future()

    def work() -> None:
        try:
            result.set_result(fetch(tqdm_class=bar))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while wait([result], REPORT_EVERY).not_done:
            report(max(list(counts.values()), default=0))  # a copy: other threads add to it
    finally:
        stop.set()
    return Path(result.result())


def _byte_counter(counts: dict[int, int], stop: threading.Event) -> type:
    """Return a class of progress bars that count bytes by bar, and end the download once `stop` is set."""
    from huggingface_hub.utils.tqdm import tqdm

    class ByteCounter(tqdm):
        """What the library takes for progress bars: of files, of bytes received and of bytes written."""

        def __init__(self, *args: Any, **options: Any):
            self._bytes = options.get("unit") == "B"
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if stop.is_set():
                raise InterruptedError
            if self._bytes:
                counts[id(self)] = counts.get(id(self), 0) + int(n or 0)
            return super().update(n)

    return ByteCounter


def _explained(error: Exception, name: str) -> FinetuneError:
    """Return an error that says why a download failed and what to do."""
    from huggingface_hub import constants, errors

    full = disk_trouble(error, Path(constants.HF_HUB_CACHE), setting="HF_HOME")
    # errors of the system have a number; those that the hub's library raises instead of others have none
    if full is not None and (not isinstance(error, OSError) or error.errno is not None):
        return full
    for cause in causes(error):
        match cause:
            case errors.GatedRepoError():
                return StepFailed(f"base model {name} is gated", "accept its terms on the hub and set HF_TOKEN")
            case errors.RepositoryNotFoundError() | errors.RevisionNotFoundError():
                return StepFailed(f"base model not found: {name} is not on {constants.ENDPOINT}", TOKEN_HINT)
            case errors.HfHubHTTPError():
                status = cause.response.status_code
                return StepFailed(
                    f"cannot download base model {name}: {constants.ENDPOINT} returned HTTP {status}",
                    "there is no such model, or HF_TOKEN is not set, wrong, or may not read it"
                    if status in (401, 403)
                    else "retry later, or set HF_ENDPOINT to a mirror",
                )
            case errors.HFValidationError():
                return StepFailed(f"cannot download base model {name}: {cause}", "check model.model_name_or_path")
            case errors.OfflineModeIsEnabled():
                return StepFailed(
                    f"cannot download base model {name}: HF_HUB_OFFLINE is set",
                    "unset it, or give a commit that is in the cache as model.model_revision",
                )
            case errors.FileMetadataError() | ValueError():
                return StepFailed(
                    f"cannot download base model {name}: {constants.ENDPOINT} does not respond like a model hub",
                    "check HF_ENDPOINT, and whether this network asks for a login or a proxy",
                )
    return StepFailed(
        f"cannot download base model {name}: {constants.ENDPOINT} is not reachable ({type(error).__name__})",
        "check the network, set HF_ENDPOINT to a mirror, or give a local folder as model.model_name_or_path",
    )
