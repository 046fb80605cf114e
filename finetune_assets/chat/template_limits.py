"""Trial renderings of untrusted chat templates, with limits of time and memory, before anything depends on them.

The first rendering of a template runs in a child process (template_child.py), which is ended if it exceeds the limits;
the device is free meanwhile. Templates that passed are remembered by digest. Later renderings, which may be of other
conversations, have the same time limit.
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
LARGEST = 1_000_000  # characters of a template; published ones have at most 20,000
HINT = "remove that template from the model's folder, or use a different model"
CONVERSATIONS = [
    [{"role": role, "content": text} for role, text in zip(roles, ("Be brief.", "Horse", "Zebra", "Owl"), strict=False)]
    for roles in (("user",), ("user", "assistant"), ("system", "user"), ("system", "user", "assistant", "user"))
]


def prove_folder(folder: Path, cache: Path | None, conversations: Sequence[Any] = ()) -> None:
    """Try every chat template of a model folder.

    Args:
        cache: folder that records the templates that passed.
        conversations: rendered in addition to the built-in ones.

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
    """Render conversations by a template in a child process.

    Raises:
        BadInput: it exceeds the limit of time or memory.
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
        with contextlib.suppress(OSError):  # a full or read-only disk: the next run tries the template again
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()


@contextlib.contextmanager
def rendering(seconds: int = SECONDS) -> Iterator[None]:
    """Limit the time of a block, in the main thread, the only one where Python allows timers.

    Raises:
        BadInput: the block exceeds the limit.
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
        BadInput: a file that may hold one cannot be read.
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
    """Yield the template texts in each form that transformers supports: one text, or named ones."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for text in value.values() if isinstance(text, str))
    elif isinstance(value, list):
        yield from (
            item["template"] for item in value if isinstance(item, dict) and isinstance(item.get("template"), str)
        )


def _try(job: str, seconds: int) -> str | None:
    """Return why a template does not pass; None if it does."""
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
    except ValueError:  # the system ended it: CPU time or memory over the limit
        if child.returncode == -signal.SIGXCPU:
            return f"it renders a short conversation for more than {seconds} s"
        return f"the process that renders it was ended (exit code {child.returncode})"
    finally:
        child.kill()
        child.wait()
    return f"it takes more than {human_size(MEMORY)} of memory to render" if error else None
