"""`finetune chat`: opens the models of one or more stages, and holds a conversation with them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from importlib import import_module

from rich.console import Console
from rich.text import Text

from finetune_assets.export.ollama.server import api as ollama_server
from finetune_assets.export.ollama.server.temporary import serving
from finetune_assets.machine.device import choose_device
from finetune_assets.models.engines.engine import Engine, Messages
from finetune_assets.models.engines.llama_cpp_engine import GgufEngine
from finetune_assets.models.engines.ollama_engine import OllamaEngine
from finetune_assets.models.engines.transformers_engine import TransformersEngine
from finetune_assets.recipe import Recipe, did_you_mean
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import BadInput, StepFailed
from finetune_assets.store.artifact import Artifact

STAGES = {
    "base": "base_model",
    "adapter": "lora_adapter",
    "merged": "merged_model",
    "gguf": "gguf_file",
    "ollama": "ollama_model",
}
QUOTES = '"""'  # as in Ollama's own terminal


@contextmanager
def open_engines(
    stages: str, recipe: Recipe, project: Project, artifacts: Mapping[str, Artifact]
) -> Iterator[dict[str, Engine]]:
    """Open the models of some stages ("base,ollama") as stage -> engine, and close them at the end.

    Raises:
        BadInput: an unknown stage.
        StepFailed: a stage has not been built yet, or nothing can serve it here.
    """
    names = list(dict.fromkeys(stage.strip() for stage in stages.split(",")))
    for stage in names:
        if stage not in STAGES:
            raise BadInput(f"--with: unknown stage {stage!r}{did_you_mean(stage, STAGES)}")
    with ExitStack() as stack:
        yield {stage: stack.enter_context(_open(stage, recipe, project, artifacts)) for stage in names}


@contextmanager
def _open(stage: str, recipe: Recipe, project: Project, artifacts: Mapping[str, Artifact]) -> Iterator[Engine]:
    needed = ["base_model", "lora_adapter"] if stage == "adapter" else [STAGES[stage]]
    for name in needed:
        if name not in artifacts:
            raise StepFailed(f"{recipe.name}/{name} has not been made yet", f"finetune run {recipe.name} --to {name}")
    path = artifacts[needed[-1]].path
    with ExitStack() as stack:
        if stage == "gguf":
            file = path / artifacts["gguf_file"].metrics["types"][recipe.served_type]["file"]
            engine: Engine = GgufEngine(file, num_ctx=recipe.ollama.num_ctx)
        elif stage == "ollama":
            host = ollama_server.configured_host()
            if ollama_server.answers(host) is None:
                host = stack.enter_context(serving(project.ollama_models))
            engine = OllamaEngine(host, recipe.ollama.name)
        else:
            folder = artifacts["base_model"].path if stage == "adapter" else path
            engine = TransformersEngine(
                folder,
                path if stage == "adapter" else None,
                choose_device(),
                template=recipe.model.template,
                trust_remote_code=recipe.model.trust_remote_code,
            )
        yield stack.enter_context(closing(engine))


def converse(
    engines: Mapping[str, Engine], console: Console, *, system: str | None, message: str | None, max_new_tokens: int
) -> None:
    """Print the answer to one message, or hold a conversation until the input ends (Ctrl-D) or `/bye`.

    Several engines answer in turn, each in its own conversation. A message is discarded if it cannot be answered, or
    if Ctrl-C interrupts the answer; the conversation continues without it.

    Args:
        system: system prompt, which a model served by Ollama does not receive: it has its own.

    Raises:
        BadInput: `message` is empty.
        StepFailed: `message` cannot be answered.
    """
    if message is not None and not message.strip():
        raise BadInput("-m: the message is empty", "write a question, or leave -m out for a conversation")
    fresh = {stage: _opening(system) if stage != "ollama" else [] for stage in engines}
    if message is not None:
        _ask(engines, console, fresh, message, max_new_tokens, quietly=len(engines) == 1)
        return
    names = ", ".join(engine.name for engine in engines.values())
    console.print(
        f"talking to {names}; /bye or Ctrl-D to leave, /reset to start over, {QUOTES} around several lines",
        style="dim",
        markup=False,
        highlight=False,
    )
    talks = fresh
    while True:
        try:
            text = _typed(console)
        except EOFError:
            return
        if text == "/bye":
            return
        if text == "/reset":
            talks = fresh
        elif text:
            try:
                talks = _ask(engines, console, talks, text, max_new_tokens, quietly=False)
            except KeyboardInterrupt:
                console.print(Text("\ninterrupted; question discarded", style="dim"))
            except StepFailed as error:
                console.print(Text(f"\n{error}", style="bold red"), soft_wrap=True)


def _opening(system: str | None) -> Messages:
    return [{"role": "system", "content": system}] if system else []


def _ask(
    engines: Mapping[str, Engine],
    console: Console,
    talks: Mapping[str, Messages],
    text: str,
    max_new_tokens: int,
    *,
    quietly: bool,
) -> dict[str, Messages]:
    """Ask all engines a question; return the conversations, extended by it and its answers."""
    longer: dict[str, Messages] = {}
    for stage, engine in engines.items():
        if len(engines) > 1:
            console.print(Text(stage, style="bold cyan"))
        asked = [*talks[stage], {"role": "user", "content": text}]
        longer[stage] = [*asked, {"role": "assistant", "content": _say(engine, console, asked, max_new_tokens)}]
        if not quietly and engine.speed is not None:
            console.print(Text(f"{engine.speed:.1f} tokens/s", style="dim"))
    return longer


def _typed(console: Console) -> str:
    """Read a message: one line, or several between three double quotes. Raises EOFError where the input ends."""
    text = _line(console, ">>> ").strip()
    if text.startswith(QUOTES):
        text = text.removeprefix(QUOTES)
        while not text.endswith(QUOTES):
            text += "\n" + _line(console, "... ").rstrip()
        text = text.removesuffix(QUOTES)
    return text.strip()


def _line(console: Console, prompt: str) -> str:
    if not (console.is_terminal and sys.stdin.isatty()):
        return console.input(prompt, markup=False)
    with suppress(ImportError):
        import_module("readline")  # with it, input() edits wide characters and reads pasted lines as one
    return input(prompt)


def _say(engine: Engine, console: Console, messages: Messages, max_new_tokens: int) -> str:
    answer = ""
    for piece in engine.stream(messages, max_new_tokens=max_new_tokens):
        answer += piece
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
    return answer
