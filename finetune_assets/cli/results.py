"""The results of a run: its artifacts, scores, and commands to try next."""

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
    """Return how many assets a run has built, and how many that it was to build were already up to date."""
    if not made and not reused:
        return "everything is up to date"
    unchanged = f", {reused} already up to date" if reused else ""
    return f"{made} asset{'' if made == 1 else 's'} materialised in {tables.duration(seconds)}{unchanged}"


def print_results(out: Console, recipe: Recipe, artifacts: Mapping[str, Artifact], models: Path) -> None:
    """Print where the artifacts are, how the model scores, and the commands that chat with it.

    Args:
        models: the project's own Ollama model store.
    """
    out.print(tables.artifacts_table(artifacts), "")
    if "eval_metrics" in artifacts:
        out.print(tables.metrics_table(artifacts["eval_metrics"].metrics), "")
    if "ollama_model" in artifacts:
        out.print(Text("Try next", style="bold"))
        for command in _next_commands(recipe, artifacts["ollama_model"], models):
            out.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def _next_commands(recipe: Recipe, served: Artifact, models: Path) -> list[str]:
    """Return commands to type here, with the path of `finetune` if it is not on the PATH."""
    program = "finetune" if shutil.which("finetune") else tables.short_path(Path(sys.argv[0]))
    return [
        f'{program} chat {recipe.name} --with base -m "Who are you?"',
        f'{program} chat {recipe.name} --with gguf -m "Who are you?"',
        *ollama(served.metrics, models),
        "make ui   # http://127.0.0.1:3000",
    ]
