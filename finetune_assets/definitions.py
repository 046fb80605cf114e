"""Dagster's front door: every recipe in configs/ becomes a chain of assets, a job and, if it asks for one, a schedule.

A recipe that cannot be read does not hide the others: its group holds one asset that fails with the message.
"""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from finetune_assets.assets.chain import bound, broken_recipe, recipe_definitions, shared_definitions
from finetune_assets.errors import BadInput
from finetune_assets.project import Project
from finetune_assets.recipe import Recipe
from finetune_assets.recipe_file import load_recipe, recipe_files, refuse_rivals


def load_definitions(project: Project) -> dg.Definitions:
    """The definitions of all recipes of a project."""
    recipes: dict[Path, Recipe] = {}
    broken: dict[Path, Exception] = {}
    for path in recipe_files(project.configs):
        try:
            recipes[path] = load_recipe(path)
        except BadInput as error:
            broken[path] = error
    chains = []
    for path, recipe in recipes.items():
        try:
            refuse_rivals(recipe, recipes.values())
            chains.append(recipe_definitions(recipe, project))
        except (BadInput, dg.DagsterInvalidDefinitionError) as error:
            broken[path] = error
    chains += [broken_recipe(path, error) for path, error in broken.items()]
    return bound(*chains, shared_definitions([recipes[path] for path in recipes if path not in broken], project))


defs = load_definitions(Project.find())
