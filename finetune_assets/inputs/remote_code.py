"""Code that comes with a model: it runs only if the recipe trusts the model (model.trust_remote_code).

transformers imports a class from a Python file when a JSON file of the model folder names it in `auto_map`. The
Python file may be outside that folder: `/any/folder--module.Class` and `/any/module.Class` work as well. llama.cpp's
converter always passes trust_remote_code=True. Therefore
- no file that Python could import is copied from a hub or a folder (`is_code`);
- `gate` replaces the functions of transformers that import such classes, or kernels from a hub, in this process;
- an untrusted child process has no folder where transformers could put such files (`child_environment`).

If transformers has the classes that a model names, it uses its own.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any

from finetune_assets.reporting.causes import causes
from finetune_assets.reporting.errors import StepFailed

NEEDED = "this model needs its own code: model.trust_remote_code"
HINT = "read that code; if you trust it, set model.trust_remote_code: true; otherwise use a different base model"
SOURCES = "*.py"  # copied if the recipe trusts the model
IMPORTABLE = (".py", ".pyw", ".pyc", ".pyo", ".pyd", ".pth", ".so", ".dll", ".dylib")
CODE_PATTERNS = tuple("*" + re.sub("[a-z]", lambda c: f"[{c[0]}{c[0].upper()}]", suffix) for suffix in IMPORTABLE)
"""The same as file name patterns for upper and lower case, because some disks ignore the case."""
LONGEST = 200  # characters of a class name in a message
AUTO_MAP = "auto_map"
CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

DYNAMIC = "transformers.dynamic_module_utils"
RESOLVE = "resolve_trust_remote_code"
IMPORTERS = {
    DYNAMIC: ("get_class_from_dynamic_module", "get_cached_module_file", "get_class_in_module"),
    "transformers.integrations.hub_kernels": ("get_kernel",),
}


class CodeRefused(ValueError):
    """A library asked for the code of a model that is not trusted.

    A ValueError, because that is what transformers raises in this case, and what its own fallbacks catch.
    """


def is_code(name: str) -> bool:
    """Return whether Python could import a file of this name, on any system."""
    return PurePath(name).suffix.lower() in IMPORTABLE


def asked_for(folder: Path, *files: str) -> list[str]:
    """Return the classes that JSON files of a model folder name, as "FILE: AUTO CLASS: CLASS".

    Unreadable files are skipped.

    Args:
        files: the files to read; without any, each file whose name ends with config.json.
    """
    classes: list[str] = []
    for path in [folder / name for name in files] or sorted(folder.glob(f"*{CONFIG}")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        classes += [f"{path.name}: {entry}" for entry in _auto_maps(content)]
    return classes


def _auto_maps(content: Any) -> Iterator[str]:
    waiting = [content]
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, list):
            waiting += value
        if not isinstance(value, dict):
            continue
        named = value.get(AUTO_MAP)
        if isinstance(named, dict):
            for auto, classes in named.items():
                one = classes if isinstance(classes, list) else [classes]
                yield _printable(f"{auto}: {', '.join(str(name) for name in one if name)}")
        elif named:
            yield _printable(str(named))
        waiting += [inner for key, inner in value.items() if key != AUTO_MAP]


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text[:LONGEST])


def refuse_unknown_architecture(folder: Path, what: str) -> None:
    """Raise StepFailed for a model that names its own classes and whose type transformers does not have."""
    if asked := asked_for(folder, CONFIG):
        from transformers import CONFIG_MAPPING

        model_type = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
        if model_type not in CONFIG_MAPPING:
            raise StepFailed(f"cannot use {what}: {NEEDED} ({asked[0]})", HINT)


def needs_its_own_code(what: str, folder: Path, file: str, reason: str | None) -> StepFailed | None:
    """Return the failure of a model that needs its own code; None if nothing shows that it does.

    Args:
        what: the beginning of the message, such as "cannot load the tokenizer of X".
        file: file of the folder whose classes the message names first.
        reason: message of the refusal to run code; None: the classes that `file` names are the reason.
    """
    named = asked_for(folder, file) or (asked_for(folder) if reason else [])
    if not named and reason is None:
        return None
    return StepFailed(f"{what}: {NEEDED} ({named[0] if named else reason})", HINT)


def refusal(error: BaseException) -> str | None:
    """Return what was refused, if a refusal caused the error."""
    return next((str(cause) for cause in causes(error) if isinstance(cause, CodeRefused)), None)


class _Gate:
    """The state of this process; closed at first."""

    lock = threading.RLock()
    guarded = False
    trusted = False


@contextmanager
def gate(*, trust: bool) -> Iterator[None]:
    """Let libraries run a model's own code only if `trust`; after the first call, none runs outside a gate.

    Raises:
        StepFailed: this version of transformers lacks the functions that are known to import such code.
    """
    with _Gate.lock:
        if not _Gate.guarded:
            _guard()
            _Gate.guarded = True
        before, _Gate.trusted = _Gate.trusted, trust
    try:
        yield
    finally:
        _Gate.trusted = before


def _guard() -> None:
    dynamic = import_module(DYNAMIC)
    guards: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
    for module, names in IMPORTERS.items():
        for name in names:
            original = _function(import_module(module), name)
            guards[name] = original, _refusing(original)
    original = _function(dynamic, RESOLVE)
    guards[RESOLVE] = original, _resolving(original)
    # also replace the functions in modules that imported them by name before
    for module in list(sys.modules.values()):
        own = getattr(module, "__dict__", {})
        for name, (original, guard) in guards.items():
            if own.get(name) is original:
                own[name] = guard


def _function(module: Any, name: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if not callable(function):
        import transformers

        raise StepFailed(
            f"cannot make sure that no code of a model runs: transformers {transformers.__version__} has no {name}",
            "install the versions of constraints.txt",
        )
    return function


def _refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def guard(*args: Any, **options: Any) -> Any:
        if _Gate.trusted:
            return original(*args, **options)
        named = args[0] if args else next(iter(options.values()), "unnamed")
        raise CodeRefused(f"{original.__name__} of {named} refused")

    return guard


def _resolving(original: Callable[..., Any]) -> Callable[..., Any]:
    """Answer for the caller where code is optional; the original would ask on the terminal."""

    @functools.wraps(original)
    def guard(
        trust: bool | None, model_name: Any, has_local_code: bool, has_remote_code: bool, *args: Any, **more: Any
    ) -> bool | None:
        if _Gate.trusted:
            answer = True if trust is None and not has_local_code else trust
            return original(answer, model_name, has_local_code, has_remote_code, *args, **more)
        if has_remote_code and not has_local_code:
            raise CodeRefused(f"transformers has no class for {model_name}")
        return False

    return guard
