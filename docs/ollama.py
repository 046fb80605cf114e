"""Printer of docs/ollama.md: one model on an Ollama of 2025 and on a stand-in for one of 2026, and `finetune verify`.

usage: python -m docs.ollama RECIPE [> docs/ollama.md]
Run the recipe first (`make demo`). Needs Ollama (on the PATH, or OLLAMA_BIN); llama-quantize, where it was built
(bench/llama_tools.py), copies weights in the stand-in. Works on a copy of the finished project.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from docs.changes import PROJECT, Copy
from docs.serving import WIDTH, Shell
from finetune_assets.export.ollama.server.releases import CHOOSES, COPIES, Release
from finetune_assets.export.ollama.server.temporary import find_binary, serving
from finetune_assets.export.serving_commands import OLLAMA
from finetune_assets.reporting.errors import StepFailed
from tests.support.ollama.standin import Settings, standing_in
from tests.support.ollama.standin_copies import backwards, one_weight_changed
from tests.support.ollama.standin_store import llama_quantize

HEAD = """# Which Ollama does what

Printed by `python -m docs.ollama {recipe}`. The finished model was published to each server below, on a free port of
the loopback interface; the page shows each command and its output. Ports and paths are replaced by the usual ones. The
stand-in is not Ollama: it does what the source of Ollama 0.33 and 0.34 says (`tests/support/ollama/standin.py`), and
copies weights with {tool}.

{table}

`finetune run` and `finetune verify` detect which way a server goes and report it (`served by`). GGUF files are written
in the form that `llama-quantize COPY` leaves unchanged, so the digest on such a server is the file's own. Where the
digest differs all the same, the check `weights` compares content, and reports how: byte for byte where the server's
folder can be read, else names, shapes, types and metadata through the server's API.
"""


def spelt(release: Release) -> str:
    """Write (0, 30, 0) as 0.30."""
    return ".".join(map(str, release)).removesuffix(".0")


ROWS = (
    ("server", f"before {spelt(CHOOSES)}", f"{spelt(CHOOSES)} and later"),
    ("---", "---", "---"),
    (
        "prompts",
        "by the model's TEMPLATE",
        "by TEMPLATE, or by the GGUF file's chat template where that can do more (tools, thinking); with "
        "`OLLAMA_GO_TEMPLATE=1` on the server always by TEMPLATE, with `0` by the chat template",
    ),
    ("weights", "stored as sent", f"{spelt(COPIES)} and later: copied with `llama-quantize COPY`"),
    ("configuration in the store", "with `rootfs`", "0.32.7 and later: without; ours has none, and both read both"),
    (
        "LoRA `ADAPTER` in a Modelfile",
        "created, but does not run in Ollama's own engine",
        "0.34.1 and later: refused. Merge the adapter first, as `merged_model` does",
    ),
    (
        "`_debug_render_only`, `logprobs`",
        "unknown to old releases",
        "known: the prompt's text and the distribution of the first token are compared",
    ),
    (
        "`prompt_eval_count`",
        "all tokens of the prompt",
        f"the first {spelt(CHOOSES)} releases leave cached ones out: then the text of the prompt counts",
    ),
)


TOOLS = ("llama-quantize itself", "our own writer of the same form")
TITLES = (
    "A real Ollama 0.9.3",
    "The stand-in",
    "The stand-in, with OLLAMA_GO_TEMPLATE=0",
    "The stand-in, if its copies had another form",
    "The stand-in, if its copies changed one weight",
)


def head(recipe: str, tool: str) -> str:
    """Return the beginning of the page.

    Args:
        tool: one of `TOOLS`, which copies weights in the stand-in.
    """
    table = "\n".join(f"| {' | '.join(row)} |" for row in ROWS)
    return HEAD.format(recipe=recipe, tool=tool, table=table)


def main(recipe: str) -> None:
    binary = find_binary()
    if binary is None:
        raise StepFailed("there is no Ollama here", "install it, or set OLLAMA_BIN to its binary")
    tool = TOOLS[0] if llama_quantize() else TOOLS[1]
    print(head(recipe, tool))
    with tempfile.TemporaryDirectory(dir=PROJECT / "dagster_home") as folder:
        copy = Copy(Path(folder) / "copy", recipe)

        def published(title: str, server: Callable[[Path], AbstractContextManager[str]], name: str) -> None:
            print(f"## {title}\n", flush=True)
            with server(Path(folder) / name) as host:
                publish_and_verify(copy, recipe, host, folder)

        servers: tuple[tuple[str, Callable[[Path], AbstractContextManager[str]]], ...] = (
            ("real", lambda models: serving(models, binary=binary)),
            ("current", standing_in),
            ("jinja", lambda models: standing_in(models, Settings(go_template="0"))),
            ("backwards", lambda models: standing_in(models, Settings(copy=backwards))),
            ("changed", lambda models: standing_in(models, Settings(copy=one_weight_changed))),
        )
        for title, (name, server) in zip(TITLES, servers, strict=True):
            published(title, server, name)


def publish_and_verify(copy: Copy, recipe: str, host: str, folder: str) -> None:
    environment = {
        **os.environ,
        **{"FINETUNE_PROJECT": str(copy.root), "DAGSTER_HOME": str(copy.home), "COLUMNS": str(WIDTH)},
        **{"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])},
        **{"OLLAMA_HOST": host, "HOME": folder, "TERM": "dumb"},
    }
    shell = Shell(copy.root, environment, {str(copy.home): "dagster_home", host: OLLAMA})
    run = f"finetune run {recipe} --to ollama_model"
    done = subprocess.run(run, shell=True, env=environment, cwd=copy.root, capture_output=True, encoding="utf-8")
    if done.returncode:
        shell.show(run, done.stdout + done.stderr)
    else:
        shell.run(f"curl -s {host}/api/version", f"finetune verify {recipe}")


if __name__ == "__main__":
    main(sys.argv[1])
