"""Dagster's front door: every recipe in configs/ becomes a chain of assets, a job and, if it asks for one, a schedule.

A recipe that cannot be read does not hide the others: its group holds one asset that fails with the message.
"""

from __future__ import annotations

import dagster as dg

from finetune_assets.assets.chain import bound, broken_recipe, recipe_definitions
from finetune_assets.errors import BadInput
from finetune_assets.project import Project
from finetune_assets.recipe_file import load_recipe, recipe_files


def load_definitions(project: Project) -> dg.Definitions:
    """The definitions of all recipes of a project."""
    chains = []
    for path in recipe_files(project.configs):
        try:
            chains.append(recipe_definitions(load_recipe(path), project))
        except BadInput as error:
            chains.append(broken_recipe(path, error))
    return bound(*chains)


defs = load_definitions(Project.find())
