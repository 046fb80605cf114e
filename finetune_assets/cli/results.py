"""What a run has made, and what to try with it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.text import Text

from finetune_assets.cli import tables
from finetune_assets.export.serving_commands import ollama
from finetune_assets.recipe import Recipe
from finetune_assets.store.artifact import Artifact


def headline(made: int, reused: int, seconds: float) -> str:
    """How many assets a run has made, and how many it found up to date although they might not have been."""
    if not made and not reused:
        return "everything is up to date"
    stayed = f", {reused} stayed as {'they were' if reused > 1 else 'it was'}" if reused else ""
    return f"{made} asset{'' if made == 1 else 's'} materialised in {tables.duration(seconds)}{stayed}"


def print_results(out: Console, recipe: Recipe, artifacts: Mapping[str, Artifact], models: Path) -> None:
    """Where everything lies, what the model is worth, and how to talk to it.

    Args:
        models: our own Ollama model store.
    """
    out.print(tables.artifacts_table(artifacts), "")
    if "eval_metrics" in artifacts:
        out.print(tables.metrics_table(artifacts["eval_metrics"].metrics), "")
    if "ollama_model" in artifacts:
        out.print(Text("Try next", style="bold"))
        for command in _next_commands(recipe, artifacts["ollama_model"], models):
            out.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def _next_commands(recipe: Recipe, served: Artifact, models: Path) -> list[str]:
    """As they can be typed here: with the program's path where it is not on the PATH."""
    program = "finetune" if shutil.which("finetune") else tables.short_path(Path(sys.argv[0]))
    return [
        f'{program} chat {recipe.name} --with base -m "Who are you?"',
        f'{program} chat {recipe.name} --with gguf -m "Who are you?"',
        *ollama(served.metrics, models),
        "make ui   # http://127.0.0.1:3000",
    ]
