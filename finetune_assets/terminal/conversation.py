"""`finetune chat`: open the model of a stage, and talk to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager

from rich.console import Console

from finetune_assets.artifacts import Artifact
from finetune_assets.chat.engines import Engine, GgufEngine, OllamaEngine, TransformersEngine
from finetune_assets.device import choose_device
from finetune_assets.errors import BadInput, StepFailed
from finetune_assets.export import ollama_server
from finetune_assets.export.ollama_process import serving
from finetune_assets.project import Project
from finetune_assets.recipe import Recipe, did_you_mean

STAGES = {
    "base": "base_model",
    "adapter": "lora_adapter",
    "merged": "merged_model",
    "gguf": "gguf_file",
    "ollama": "ollama_model",
}


@contextmanager
def open_engine(stage: str, recipe: Recipe, project: Project, artifacts: Mapping[str, Artifact]) -> Iterator[Engine]:
    """The model of a stage, ready to talk; closed (and its server stopped, if one was started) at the end.

    Raises:
        BadInput: an unknown stage.
        StepFailed: that stage was not made yet, or nothing can serve it here.
    """
    if stage not in STAGES:
        raise BadInput(f"--with: unknown stage {stage!r}{did_you_mean(stage, STAGES)}")
    needed = ["base_model", "lora_adapter"] if stage == "adapter" else [STAGES[stage]]
    for name in needed:
        if name not in artifacts:
            raise StepFailed(f"{recipe.name}/{name} has not been made yet", f"finetune run {recipe.name} --to {name}")
    path = artifacts[needed[-1]].path
    with ExitStack() as stack:
        if stage == "gguf":
            engine: Engine = GgufEngine(path / artifacts["gguf_file"].metrics["types"][recipe.served_type]["file"])
        elif stage == "ollama":
            host = ollama_server.configured_host()
            if ollama_server.answers(host) is None:
                host = stack.enter_context(serving(project.ollama_models))
            engine = OllamaEngine(host, recipe.ollama.name)
        else:
            folder = artifacts["base_model"].path if stage == "adapter" else path
            engine = TransformersEngine(folder, path if stage == "adapter" else None, choose_device())
        yield stack.enter_context(closing(engine))


def converse(engine: Engine, console: Console, *, system: str | None, message: str | None, max_new_tokens: int) -> None:
    """Answer one message, or hold a conversation until the input ends (Ctrl-D) or `/bye`."""
    opening = [{"role": "system", "content": system}] if system else []
    if message is not None:
        _say(engine, console, [*opening, {"role": "user", "content": message}], max_new_tokens)
        return
    console.print(f"talking to {engine.name}; /bye or Ctrl-D to leave, /reset to begin again", style="dim")
    messages = list(opening)
    while True:
        try:
            text = console.input("[bold]>>> [/bold]").strip()
        except EOFError:
            return
        if text == "/bye":
            return
        if text == "/reset":
            messages = list(opening)
            continue
        if text:
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": _say(engine, console, messages, max_new_tokens)})


def _say(engine: Engine, console: Console, messages: list[dict[str, str]], max_new_tokens: int) -> str:
    answer = ""
    for piece in engine.stream(messages, max_new_tokens=max_new_tokens):
        answer += piece
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
    return answer
