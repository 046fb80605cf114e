"""Code that comes with a model: it never runs unless the recipe trusts the model (model.trust_remote_code).

transformers imports a class from a Python file where a JSON file of the model's folder names one in `auto_map`. The
file need not be in that folder: `/any/folder--module.Class` and `/any/module.Class` are read, too. llama.cpp's
converter asks for such classes with trust_remote_code=True, whatever anybody says. Therefore
- no file that Python could import is taken from a hub or a folder (`is_code`);
- `gate` replaces the functions of transformers that import such classes, or kernels from a hub, in this process;
- a child process that is not trusted has no folder in which transformers could put them (`child_environment`).

A model that names classes which transformers has itself loads with those.
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
HINT = "read that code; if you trust it, set model.trust_remote_code: true; else take another base model"
SOURCES = "*.py"  # what is taken along where the recipe trusts the model
IMPORTABLE = (".py", ".pyw", ".pyc", ".pyo", ".pyd", ".pth", ".so", ".dll", ".dylib")
CODE_PATTERNS = tuple("*" + re.sub("[a-z]", lambda c: f"[{c[0]}{c[0].upper()}]", suffix) for suffix in IMPORTABLE)
"""The same for whoever takes file name patterns, in any case: some disks make no difference."""
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
    """Whether Python could import a file of this name, on any system."""
    return PurePath(name).suffix.lower() in IMPORTABLE


def asked_for(folder: Path, *files: str) -> list[str]:
    """The classes that JSON files of a model's folder name, as "FILE: AUTO CLASS: CLASS"; unreadable files name none.

    Args:
        files: look into these files only; without any, into each whose name ends with config.json.
    """
    found: list[str] = []
    for path in [folder / name for name in files] or sorted(folder.glob(f"*{CONFIG}")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        found += [f"{path.name}: {entry}" for entry in _auto_maps(content)]
    return found


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
    """StepFailed for a model that names its own classes and is of a type that transformers does not have."""
    if asked := asked_for(folder, CONFIG):
        from transformers import CONFIG_MAPPING

        model_type = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
        if model_type not in CONFIG_MAPPING:
            raise StepFailed(f"cannot use {what}: {NEEDED} ({asked[0]})", HINT)


def needs_its_own_code(what: str, folder: Path, file: str, reason: str | None) -> StepFailed | None:
    """The failure of a model that cannot be read without its own code; None where nothing speaks for that.

    Args:
        what: could not be done, e.g. "cannot load the tokenizer of X".
        file: of the folder, whose classes come first in the message.
        reason: what refused to run code; None: whatever `file` asks for is taken for the reason.
    """
    named = asked_for(folder, file) or (asked_for(folder) if reason else [])
    if not named and reason is None:
        return None
    return StepFailed(f"{what}: {NEEDED} ({named[0] if named else reason})", HINT)


def refusal(error: BaseException) -> str | None:
    """What was refused, if that is why the error was raised."""
    return next((str(cause) for cause in causes(error) if isinstance(cause, CodeRefused)), None)


class _Gate:
    """The state of this process: closed until somebody opens it."""

    lock = threading.RLock()
    guarded = False
    trusted = False


@contextmanager
def gate(*, trust: bool) -> Iterator[None]:
    """While open, libraries run a model's own code only if `trust`. After the first call, none runs outside of a gate.

    Raises:
        StepFailed: this version of transformers has not the functions that are known to import such code.
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
    # others have imported the functions by name; whoever does so later gets the guards
    for module in list(sys.modules.values()):
        own = getattr(module, "__dict__", {})
        for name, (original, guard) in guards.items():
            if own.get(name) is original:
                own[name] = guard


def _function(module: Any, name: str) -> Callable[..., Any]:
    found = getattr(module, name, None)
    if not callable(found):
        import transformers

        raise StepFailed(
            f"cannot make sure that no code of a model runs: transformers {transformers.__version__} has no {name}",
            "install the versions of constraints.txt",
        )
    return found


def _refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def guard(*args: Any, **options: Any) -> Any:
        if _Gate.trusted:
            return original(*args, **options)
        named = args[0] if args else next(iter(options.values()), "unnamed")
        raise CodeRefused(f"{original.__name__} of {named} refused")

    return guard


def _resolving(original: Callable[..., Any]) -> Callable[..., Any]:
    """Answer for the caller where code is optional; the original would ask on the terminal where nobody has said."""

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
