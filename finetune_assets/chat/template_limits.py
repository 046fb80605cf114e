"""Chat templates of strangers, tried out before anything depends on them: so long, and so much memory, and no more.

Where a template is rendered for the first time it is rendered in a process of its own (template_child.py), which is
ended when it exceeds the limits; the device is not held meanwhile. What passed is remembered by its digest. Later
renderings, of conversations that were not tried, end after the same time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune_assets.inputs.json_text import read_model_json
from finetune_assets.inputs.regular_files import read_utf8
from finetune_assets.reporting.errors import BadInput
from finetune_assets.reporting.printable import human_size

SECONDS = 10
MEMORY = 2_000_000_000  # bytes of address space: python and jinja2 take 60 MB
LARGEST = 1_000_000  # characters of a template; published ones have up to 20,000
HINT = "take that template out of the model's folder, or take a model whose template can be used"
CONVERSATIONS = [
    [{"role": role, "content": text} for role, text in zip(roles, ("Be brief.", "Horse", "Zebra", "Owl"), strict=False)]
    for roles in (("user",), ("user", "assistant"), ("system", "user"), ("system", "user", "assistant", "user"))
]


def prove_folder(folder: Path, cache: Path | None, conversations: Sequence[Any] = ()) -> None:
    """Try every chat template of a model folder.

    Args:
        cache: where passed trials are remembered.
        conversations: are tried besides the built-in ones.

    Raises:
        BadInput: a template exceeds the limits.
    """
    for where, text in templates_of(folder):
        prove(text, [*CONVERSATIONS, *conversations], called=f"the chat template of {where}", cache=cache)


def prove(
    template: str,
    conversations: Sequence[Any] = CONVERSATIONS,
    *,
    called: str = "the chat template",
    cache: Path | None = None,
    seconds: int = SECONDS,
) -> None:
    """Render conversations by a template in a process of its own.

    Raises:
        BadInput: it takes longer or more memory than a template may.
    """
    if len(template) > LARGEST:
        raise BadInput(f"{called} has {len(template)} characters (limit {LARGEST})", HINT)
    job = {"template": template, "conversations": conversations, "specials": {"bos_token": "<s>", "eos_token": "</s>"}}
    question = json.dumps([job, seconds, MEMORY], sort_keys=True).encode("utf-8", "surrogatepass")
    passed = cache / "templates" / hashlib.sha256(question).hexdigest()[:32] if cache else None
    if passed is not None and passed.is_file():
        return
    if (why := _try(json.dumps({**job, "seconds": seconds, "bytes": MEMORY}), seconds)) is not None:
        raise BadInput(f"{called} cannot be used: {why}", HINT)
    if passed is not None:
        with contextlib.suppress(OSError):  # a full or read-only disk: it is tried again
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()


@contextlib.contextmanager
def rendering(seconds: int = SECONDS) -> Iterator[None]:
    """End what takes longer, in the main thread, where Python lets a timer in.

    Raises:
        BadInput: the time is over.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise BadInput(f"the chat template renders a conversation for more than {seconds} s", HINT)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def templates_of(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the name of the file and the text of each chat template in a model folder.

    Raises:
        BadInput: a file that would hold one cannot be read.
    """
    own = folder / "chat_template.jinja"
    if own.exists():
        yield own.name, read_utf8(own, 4 * LARGEST)
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        yield path.name, read_utf8(path, 4 * LARGEST)
    for name in ("tokenizer_config.json", "chat_template.json", "chat.json"):
        if (folder / name).exists():
            value = read_model_json(folder / name)
            for key in ("chat_template", "template"):
                yield from ((name, text) for text in _texts(value.get(key)))


def _texts(value: Any) -> Iterator[str]:
    """The texts in any of the forms that transformers knows: one text, or a list of named ones."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for text in value.values() if isinstance(text, str))
    elif isinstance(value, list):
        yield from (
            item["template"] for item in value if isinstance(item, dict) and isinstance(item.get("template"), str)
        )


def _try(job: str, seconds: int) -> str | None:
    """Why a template does not pass; None if it does."""
    child = subprocess.Popen(
        [sys.executable, "-I", str(Path(__file__).with_name("template_child.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ},
    )
    try:
        answer, _ = child.communicate(job, timeout=seconds)
        error = json.loads(answer)["error"]
    except subprocess.TimeoutExpired:
        return f"it renders a short conversation for more than {seconds} s"
    except ValueError:  # it was ended by the system: its limit of CPU time, or of memory
        if child.returncode == -signal.SIGXCPU:
            return f"it renders a short conversation for more than {seconds} s"
        return f"the process that renders it was ended (exit code {child.returncode})"
    finally:
        child.kill()
        child.wait()
    return f"it takes more than {human_size(MEMORY)} of memory to render" if error else None
