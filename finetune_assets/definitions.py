"""Dagster's front door: every recipe in configs/ becomes a chain of assets, a job and, if it asks for one, a schedule.

A recipe that cannot be read does not hide the others: its group holds one asset that fails with the message.
"""

from __future__ import annotations

import dagster as dg

from finetune_assets.assets.chain import bound, broken_recipe, recipe_definitions, shared_definitions
from finetune_assets.errors import BadInput
from finetune_assets.project import Project
from finetune_assets.recipe_file import load_recipe, recipe_files


def load_definitions(project: Project) -> dg.Definitions:
    """The definitions of all recipes of a project."""
    recipes, chains = [], []
    for path in recipe_files(project.configs):
        try:
            recipe = load_recipe(path)
            chains.append(recipe_definitions(recipe, project))
            recipes.append(recipe)
        except (BadInput, dg.DagsterInvalidDefinitionError) as error:
            chains.append(broken_recipe(path, error))
    return bound(*chains, shared_definitions(recipes, project))


defs = load_definitions(Project.find())
