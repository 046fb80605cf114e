"""Recipes on disk: find one by name, read it, and report all its errors at once."""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_assets.inputs.pydantic_errors import Location, explain
from finetune_assets.inputs.regular_files import why_not_regular
from finetune_assets.recipe import DATASETS, Recipe, Section, did_you_mean, name_problem
from finetune_assets.recipe.recipe import sections
from finetune_assets.recipe.yaml_text import Document
from finetune_assets.reporting.errors import BadInput

SHOWN = 20  # errors listed for one file
LONGEST_PATH = 4096  # bytes, PATH_MAX of Linux


def recipe_files(configs: Path) -> list[Path]:
    """Return the recipe files of the project, sorted by name."""
    return sorted(path for path in configs.glob("*.yaml") if not path.name.startswith((".", "_")))


def recipe_name(path: Path) -> str:
    """Return the name of a recipe file, in composed characters (NFC): macOS may store `é` as two characters."""
    return unicodedata.normalize("NFC", path.stem)


def recipe_path(name: str, configs: Path) -> Path:
    """Return the path of the recipe with a name, whether it exists or not."""
    path = configs / f"{name}.yaml"
    if name.isascii() or os.path.lexists(path):
        return path
    return next((file for file in recipe_files(configs) if recipe_name(file) == recipe_name(path)), path)


def find_recipe(spec: str, configs: Path) -> Path:
    """Find the file of a recipe.

    Args:
        spec: the name of a recipe in `configs`, or a path.

    Raises:
        BadInput: there is no such recipe.
    """
    if "\0" in spec or len(os.fsencode(spec)) > LONGEST_PATH:
        raise BadInput(f"unknown recipe {spec[:60]!r}...", "name a file in configs/, or give a path that ends in .yaml")
    path = Path(spec)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        own = recipe_path(recipe_name(path), configs)
        if why_not_regular(path) is None and why_not_regular(own) is None and not path.samefile(own):
            raise BadInput(
                f"{spec}: its assets would replace those of {own}",
                "rename the file: the assets have the name of the recipe file",
            )
        if os.path.lexists(path):
            return path
        raise BadInput(f"{spec}: no such recipe file", f"recipes of this project: {_names(configs)}")
    path = recipe_path(spec, configs)
    if os.path.lexists(path):
        return path
    known = [recipe_name(file) for file in recipe_files(configs)]
    raise BadInput(
        f"unknown recipe {spec!r}{did_you_mean(spec, known) if known else ''}",
        f"name a file in {configs.name}/, or give a path that ends in .yaml",
    )


def load_recipe(path: Path) -> Recipe:
    """Read and check one recipe.

    Raises:
        BadInput: the file cannot be read or has errors; one line for each error, with file, line and key.
    """
    document = Document(path)
    if not document.problems and not isinstance(document.value, dict):
        raise BadInput(f"{path}: a recipe is a mapping of sections", f"sections: {', '.join(sections())}")
    problems = [*document.problems, *((1, text) for text in _name_problems(path))]
    recipe = None
    if document.value is not None:
        if "name" in document.value:
            problems.append((document.line(("name",)), "name: the file name is the recipe's name; remove this key"))
        try:
            recipe = Recipe.model_validate({**document.value, "name": recipe_name(path)})
        except ValidationError as error:
            errors = sorted(error.errors(), key=lambda item: document.line(item["loc"]))
            problems += [(document.line(item["loc"]), explain(item, _suggestion)) for item in errors[: SHOWN + 1]]
    if problems or recipe is None:
        listed = sorted(set(problems))
        more = [f"{path}: ... and more like these"] if len(listed) > SHOWN else []
        raise BadInput("\n".join([*(f"{path}:{line}: {_short(text)}" for line, text in listed[:SHOWN]), *more]))
    return recipe


def recipe_of(values: Mapping[str, Any], name: str, where: str) -> Recipe:
    """Check a recipe that is written inside another file.

    Args:
        where: what the messages begin with, such as the other file's path.

    Raises:
        BadInput: one line for each thing that is wrong.
    """
    problems = [f"the name {name!r} names the recipe's assets: {why}"] if (why := name_problem(name)) else []
    if "name" in values:
        problems.append("name: it stands beside the recipe, not in it")
    try:
        recipe = Recipe.model_validate({**values, "name": name})
    except ValidationError as error:
        problems += sorted({_short(explain(item, _suggestion)) for item in error.errors()[:SHOWN]})
    if problems:
        raise BadInput("\n".join(f"{where}: {text}" for text in problems))
    return recipe


def renamed(recipe: Recipe, name: str, where: str) -> Recipe:
    """Give a recipe a name other than its file's.

    Raises:
        BadInput: the name cannot be a recipe's; the message begins with `where`.
    """
    if (why := name_problem(name)) is not None:
        raise BadInput(f"{where}: the name {name!r} names the recipe's assets: {why}")
    return recipe.model_copy(update={"name": name})


def _name_problems(path: Path) -> Iterator[str]:
    name = recipe_name(path)
    if (why := name_problem(name)) is not None:
        yield f"the file's name {name!r} cannot be a recipe's name: {why}; rename the file"
    if name == DATASETS:
        yield f"the name {name!r} is reserved for the group of the data sets; rename the file"
    if not name.isascii():
        for other in recipe_files(path.parent):
            if other.name != path.name and recipe_name(other) == name:
                yield f"the file's name {path.name!a} is the same text as {other.name!a}: rename one of them"


def refuse_rivals(recipe: Recipe, others: Iterable[Recipe]) -> None:
    """Refuse a recipe whose Ollama name another recipe has; they would keep replacing each other's model.

    Ollama ignores the case of names.

    Raises:
        BadInput: another recipe has the same `ollama.name`.
    """
    name = recipe.ollama.name.lower()
    rivals = [other.name for other in others if other.name != recipe.name and other.ollama.name.lower() == name]
    if rivals:
        raise BadInput(
            f"ollama.name {recipe.ollama.name!r} of {recipe.name} is also the name in {', '.join(rivals)}",
            "give one of them a different name: each would replace the other's model",
        )


def readable_recipes(configs: Path) -> list[Recipe]:
    """Return the recipes of the project that can be read."""
    recipes = []
    for path in recipe_files(configs):
        with contextlib.suppress(BadInput):
            recipes.append(load_recipe(path))
    return recipes


def json_schema() -> dict[str, Any]:
    """Return the recipe's JSON schema, for editors (`# yaml-language-server: $schema=...`)."""
    schema = Recipe.model_json_schema()
    schema["properties"].pop("name")
    schema["required"].remove("name")
    return schema


def _short(text: str) -> str:
    """Shorten an error that quotes a long value."""
    return text if len(text) <= 600 else f"{text[:400]} ... {text[-200:]}"


def _suggestion(location: Location) -> str:
    """Return the nearest key of the section, or the section that has a key of this name."""
    word = str(location[-1])
    section = _model_at(location[:-1])
    if section is None:
        return ""
    owners = [name for name, model in sections().items() if word in model.model_fields]
    if owners:
        return f"; it belongs to the section {owners[0]!r}"
    return did_you_mean(word, [name for name in section.model_fields if not (section is Recipe and name == "name")])


def _model_at(location: Location) -> type[Section] | None:
    if not location:
        return Recipe
    return sections().get(str(location[0])) if len(location) == 1 else None


def _names(configs: Path) -> str:
    return ", ".join(recipe_name(file) for file in recipe_files(configs)) or "none"
