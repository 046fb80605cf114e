"""Every family of bad inputs, and a sample of them all."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from tests.bad_inputs.case import Case
from tests.bad_inputs.commands import command_lines, surroundings
from tests.bad_inputs.data import data_files, registries
from tests.bad_inputs.models import base_models
from tests.bad_inputs.recipes import recipe_files, recipe_values, schedules, yaml_syntax

FAMILIES: dict[str, Callable[[], Iterator[Case]]] = {
    "yaml": yaml_syntax,
    "files": recipe_files,
    "values": recipe_values,
    "schedules": schedules,
    "registry": registries,
    "data": data_files,
    "base": base_models,
    "commands": command_lines,
    "surroundings": surroundings,
}


def cases(families: list[str]) -> list[Case]:
    """All cases of these families; of all if none is named."""
    return [case for name in families or FAMILIES for case in FAMILIES[name]()]


def sample(chosen: list[Case], share: int) -> list[Case]:
    """One in `share` of the cases, always the same ones, from every part of the list."""
    return chosen if share == 1 else sorted(random.Random(share).sample(chosen, len(chosen) // share), key=chosen.index)
