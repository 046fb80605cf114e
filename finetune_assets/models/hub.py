"""Base models from a Hugging Face hub: pinned to a commit, fetched into the hub's own cache, failures explained."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_assets.machine.disk import disk_trouble
from finetune_assets.reporting.causes import causes
from finetune_assets.reporting.errors import FinetuneError, StepFailed
from finetune_assets.reporting.events import Message, Progress, message

COMMIT = re.compile(r"[0-9a-f]{40}")
TELL_EVERY = 5.0  # seconds between two messages of how far it is
TOKEN_HINT = "check model.model_name_or_path and model.model_revision; a private model needs HF_TOKEN"


@dataclass(frozen=True)
class Announced:
    """What a hub says of a model before it is fetched.

    Args:
        bytes: the size of the files that are wanted.
        missing: the same of those that are not in the cache yet.
        weights: elements by dtype (safetensors' names); empty where the hub does not know.
        cache: the folder that they are fetched into.
    """

    bytes: int
    missing: int
    weights: Counter[str]
    cache: Path


def announced(repo_id: str, revision: str, wanted: Callable[[str], bool]) -> Announced | None:
    """The size of a model on the hub, or None if the hub does not say: whoever then fetches it hears why."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    try:
        info = HfApi().model_info(
            repo_id, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except Exception:  # also whatever the hub's HTTP library of the day raises
        return None
    files = {
        file.rfilename: file.size or 0
        for file in info.siblings or []
        if "/" not in file.rfilename and wanted(file.rfilename)
    }
    there = [name for name in files if isinstance(try_to_load_from_cache(repo_id, name, revision=info.sha), str)]
    return Announced(
        bytes=sum(files.values()),
        missing=sum(files.values()) - sum(files[name] for name in there),
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
    """The folder in the hub's cache that holds a model's files, and the commit that the revision stands for.

    Folders inside the repository are left out: they hold the model in other formats. Files that are in the cache are
    not fetched again, so a download that was interrupted goes on with the next file; a connection lost in the middle
    of a file is taken up where it broke. With a commit as revision and all files in the cache, no network is needed.

    Args:
        patterns: the names of the files to fetch.
        but: and those, among them, of files to leave out.

    Raises:
        StepFailed: the files cannot be had.
    """
    from huggingface_hub import HfApi, constants

    try:
        commit = revision
        if not COMMIT.fullmatch(revision):
            # without a timeout the library waits for ever
            commit = HfApi().model_info(repo_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha
            assert commit is not None
        what = f"{repo_id} at {commit}"
        progress(message(f"downloading {what}"))
        return _snapshot(repo_id, commit, patterns, but, lambda so_far: progress(_message(what, so_far))), commit
    except Exception as error:  # also whatever the hub's HTTP library of the day raises
        raise _explained(error, f"{repo_id} (revision {revision})") from error


def _snapshot(
    repo_id: str, commit: str, patterns: Sequence[str], but: Sequence[str], tell: Callable[[int], None]
) -> Path:
    """Download in threads of their own, and tell this one's caller the bytes so far every now and then.

    The library would finish the files at hand before it lets an interrupt through; here they end with the next piece.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    stop = threading.Event()
    counts: dict[int, int] = {}

    class Received(tqdm):
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

    result: Future[str] = Future()

    def work() -> None:
        try:
            result.set_result(
                snapshot_download(
                    repo_id,
                    revision=commit,
                    allow_patterns=list(patterns),
                    ignore_patterns=["*/*", *but],
                    tqdm_class=Received,
                )
            )
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while wait([result], TELL_EVERY).not_done:
            tell(max(list(counts.values()), default=0))  # a copy: other threads add to it
    finally:
        stop.set()
    return Path(result.result())


def _message(what: str, so_far: int) -> Message:
    return message(f"downloading {what}: {so_far / 1e6:.0f} MB so far")


def _explained(error: Exception, name: str) -> FinetuneError:
    from huggingface_hub import constants, errors

    full = disk_trouble(error, Path(constants.HF_HUB_CACHE), setting="HF_HOME")
    # errors of the system have a number; those that the hub's library makes of anything else have none
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
                    f"base model {name} cannot be had: {constants.ENDPOINT} answers {status}",
                    "there is no such model, or HF_TOKEN is not set, wrong, or may not read it"
                    if status in (401, 403)
                    else "try again later, or set HF_ENDPOINT to a mirror",
                )
            case errors.HFValidationError():
                return StepFailed(f"base model {name} cannot be had: {cause}", "check model.model_name_or_path")
            case errors.OfflineModeIsEnabled():
                return StepFailed(
                    f"base model {name} cannot be had: HF_HUB_OFFLINE is set",
                    "unset it, or give a commit that is in the cache as model.model_revision",
                )
            case errors.FileMetadataError() | ValueError():
                return StepFailed(
                    f"base model {name} cannot be had: {constants.ENDPOINT} does not answer as a hub does",
                    "check HF_ENDPOINT, and whether this network asks for a login or a proxy",
                )
    return StepFailed(
        f"base model {name} cannot be had: {constants.ENDPOINT} is not reachable ({type(error).__name__})",
        "check the network, set HF_ENDPOINT to a mirror, or give a local folder as model.model_name_or_path",
    )
