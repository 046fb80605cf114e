"""Dagster's front door: every recipe in configs/ becomes a chain of assets, a job and, if it asks for one, a schedule.

A broken recipe does not affect the others: its group holds one asset that fails with the error message.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from finetune_assets.assets.automation.chain import bound, broken_recipe, recipe_definitions, shared_definitions
from finetune_assets.assets.keys import Mount, word_of
from finetune_assets.recipe import Recipe
from finetune_assets.recipe.file import load_recipe, recipe_files, recipe_name, refuse_rivals
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import BadInput, FinetuneError, unforeseen
from finetune_assets.reporting.masking import mask_logging


def load_definitions(project: Project) -> dg.Definitions:
    """Return the definitions of all recipes of a project."""
    files = recipe_files(project.configs)
    recipes: dict[Path, Recipe] = {}
    broken: dict[Path, FinetuneError] = {}
    for path in files:
        with _kept(path, broken):
            _refuse_namesakes(path, files)
            recipes[path] = load_recipe(path)
    chains = []
    mount = Mount(owners=_owners(project))
    for path, recipe in recipes.items():
        with _kept(path, broken):
            refuse_rivals(recipe, recipes.values())
            chains.append(recipe_definitions(recipe, project, mount))
    words = {word_of(recipe_name(path)) for path in files if path not in broken}
    for path, error in broken.items():
        name = recipe_name(path)
        word = word_of(name) if word_of(name) not in words else word_of(f"{name} {path.name} {len(words)}")
        words.add(word)
        chains.append(broken_recipe(name, word, error))
    return bound(*chains, shared_definitions([recipes[path] for path in recipes if path not in broken], project, mount))


def _owners(project: Project) -> tuple[str, ...]:
    """Return the owners of every asset: `owners` under [tool.finetune-assets] in the project's pyproject.toml."""
    path = project.root / "pyproject.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {}).get("finetune-assets", {})
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from None
    return tuple(table.get("owners", ()))


@contextmanager
def _kept(path: Path, broken: dict[Path, FinetuneError]) -> Iterator[None]:
    """Keep the error of one recipe, so that the others still load."""
    try:
        yield
    except FinetuneError as error:
        broken[path] = error
    except Exception as error:
        broken[path] = unforeseen(error, f"the recipe {recipe_name(path)}")


def _refuse_namesakes(path: Path, files: Sequence[Path]) -> None:
    """Refuse a recipe whose Dagster name is the file name of a second recipe.

    Raises:
        BadInput: such a recipe exists.
    """
    name = recipe_name(path)
    rivals = [file for file in files if recipe_name(file) == word_of(name) != name]
    if rivals:
        raise BadInput(f"{path}: Dagster calls it {word_of(name)}, the name of {rivals[0]}", "rename one of the files")


mask_logging()
defs = load_definitions(Project.find())
