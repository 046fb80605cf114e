"""`finetune chat`: open the models of one or more stages, and talk to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager

from rich.console import Console
from rich.text import Text

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
def open_engines(
    stages: str, recipe: Recipe, project: Project, artifacts: Mapping[str, Artifact]
) -> Iterator[dict[str, Engine]]:
    """The models of some stages ("base,ollama"), ready to talk, by stage; closed at the end.

    Raises:
        BadInput: an unknown stage.
        StepFailed: a stage was not made yet, or nothing can serve it here.
    """
    named = list(dict.fromkeys(stage.strip() for stage in stages.split(",")))
    for stage in named:
        if stage not in STAGES:
            raise BadInput(f"--with: unknown stage {stage!r}{did_you_mean(stage, STAGES)}")
    with ExitStack() as stack:
        yield {stage: stack.enter_context(_open(stage, recipe, project, artifacts)) for stage in named}


@contextmanager
def _open(stage: str, recipe: Recipe, project: Project, artifacts: Mapping[str, Artifact]) -> Iterator[Engine]:
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


def converse(
    engines: Mapping[str, Engine], console: Console, *, system: str | None, message: str | None, max_new_tokens: int
) -> None:
    """Have one message answered, or hold a conversation until the input ends (Ctrl-D) or `/bye`.

    Several engines answer in turn, each in a conversation of its own.
    """
    opening = [{"role": "system", "content": system}] if system else []
    talks = {stage: list(opening) for stage in engines}

    def ask(text: str, *, quietly: bool) -> None:
        for stage, engine in engines.items():
            if len(engines) > 1:
                console.print(Text(stage, style="bold cyan"))
            talks[stage].append({"role": "user", "content": text})
            talks[stage].append({"role": "assistant", "content": _say(engine, console, talks[stage], max_new_tokens)})
            if not quietly and engine.speed is not None:
                console.print(Text(f"{engine.speed:.1f} tokens/s", style="dim"))

    if message is not None:
        ask(message, quietly=len(engines) == 1)
        return
    names = ", ".join(engine.name for engine in engines.values())
    console.print(f"talking to {names}; /bye or Ctrl-D to leave, /reset to begin again", style="dim", markup=False)
    while True:
        try:
            text = console.input("[bold]>>> [/bold]").strip()
        except EOFError:
            return
        if text == "/bye":
            return
        if text == "/reset":
            talks = {stage: list(opening) for stage in engines}
        elif text:
            ask(text, quietly=False)


def _say(engine: Engine, console: Console, messages: list[dict[str, str]], max_new_tokens: int) -> str:
    answer = ""
    for piece in engine.stream(messages, max_new_tokens=max_new_tokens):
        answer += piece
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
    return answer
