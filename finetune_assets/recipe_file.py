"""Recipes on disk: find one by name, read it, and say everything that is wrong with it at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from finetune_assets.errors import BadInput
from finetune_assets.recipe import DATASETS, RECIPE_NAME, Recipe, did_you_mean

Path_ = tuple[str | int, ...]


def recipe_files(configs: Path) -> list[Path]:
    """Every recipe of the project, by name."""
    return sorted(path for path in configs.glob("*.yaml") if not path.name.startswith((".", "_")))


def recipe_path(name: str, configs: Path) -> Path:
    """Where the recipe of a name lies, if there is one."""
    return configs / f"{name}.yaml"


def find_recipe(spec: str, configs: Path) -> Path:
    """The file of a recipe given by its name in `configs` or by a path.

    Raises:
        BadInput: there is no such recipe.
    """
    path = Path(spec)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        own = recipe_path(path.stem, configs)
        if path.is_file() and own.is_file() and not path.samefile(own):
            raise BadInput(
                f"{spec}: its assets would take the place of those of {own}",
                "give the file another name: a recipe's assets are named after it",
            )
        if path.is_file():
            return path
        raise BadInput(f"{spec}: no such recipe file", f"recipes of this project: {_names(configs)}")
    path = recipe_path(spec, configs)
    if path.is_file():
        return path
    known = [file.stem for file in recipe_files(configs)]
    raise BadInput(
        f"unknown recipe {spec!r}{did_you_mean(spec, known) if known else ''}",
        f"a recipe is a file in {configs.name}/ (say its name) or any path ending in .yaml",
    )


def load_recipe(path: Path) -> Recipe:
    """Read and check one recipe.

    Raises:
        BadInput: one line for each thing that is wrong, with file, line and key.
    """
    text = _read(path)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        loaded = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise BadInput(f"{path}{where}: not valid YAML: {error.problem or error}") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{path}: not valid YAML: {error}") from None
    if not isinstance(loaded, dict) or node is None:
        raise BadInput(f"{path}: a recipe is a mapping of sections", f"sections: {', '.join(_sections())}")
    lines: dict[Path_, int] = {}
    problems = _walk(node, (), lines)
    name = path.stem
    if not RECIPE_NAME.fullmatch(name):
        problems.append((1, f"the file's name {name!r} names the asset group: use letters, digits and '_' only"))
    if name == DATASETS:
        problems.append((1, f"the name {name!r} is taken by the group of the data sets: rename the file"))
    if "name" in loaded:
        problems.append((lines[("name",)], "name: a recipe is named by its file; remove this key"))
    recipe = None
    try:
        recipe = Recipe.model_validate({**loaded, "name": name})
    except ValidationError as error:
        problems += [(_line(lines, item["loc"]), _explain(item)) for item in error.errors()]
    if problems or recipe is None:
        listing = "\n".join(f"{path}:{line}: {text}" for line, text in sorted(set(problems)))
        raise BadInput(listing)
    return recipe


def refuse_rivals(recipe: Recipe, others: Iterable[Recipe]) -> None:
    """Two recipes that serve under one name, to Ollama whatever its case, would take each other's place for ever.

    Raises:
        BadInput: another recipe has the same `ollama.name`.
    """
    name = recipe.ollama.name.lower()
    rivals = [other.name for other in others if other.name != recipe.name and other.ollama.name.lower() == name]
    if rivals:
        raise BadInput(
            f"ollama.name {recipe.ollama.name!r} of {recipe.name} is also that of {', '.join(rivals)}",
            "each would replace the other's model: give one of them another name",
        )


def readable_recipes(configs: Path) -> list[Recipe]:
    """Every recipe of the project that can be read."""
    found = []
    for path in recipe_files(configs):
        with contextlib.suppress(BadInput):
            found.append(load_recipe(path))
    return found


def json_schema() -> dict[str, Any]:
    """The recipe's JSON schema, for editors (`# yaml-language-server: $schema=...`)."""
    schema = Recipe.model_json_schema()
    schema["properties"].pop("name")
    schema["required"].remove("name")
    return schema


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 at byte {error.start}", "save the file as UTF-8") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None


def _walk(node: yaml.Node, at: Path_, lines: dict[Path_, int]) -> list[tuple[int, str]]:
    """Fill `lines` with the line of every key; return keys that are given twice."""
    problems: list[tuple[int, str]] = []
    lines[at] = lines.get(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, key.value)
            if here in lines:
                problems.append(
                    (key.start_mark.line + 1, f"{_dotted(here)}: given twice (first in line {lines[here]})")
                )
            lines[here] = key.start_mark.line + 1
            problems += _walk(value, here, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            problems += _walk(value, (*at, index), lines)
    return problems


def _line(lines: dict[Path_, int], where: Path_) -> int:
    while where and where not in lines:
        where = where[:-1]
    return lines.get(where, 1)


def _explain(item: Any) -> str:
    """One line for one pydantic error: the key, and what to write instead."""
    where: Path_ = item["loc"]
    key = _dotted(where)
    kind = item["type"]
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_hint_for(where)}"
    if kind == "missing":
        return f"{key}: missing"
    if kind == "model_type" or kind == "model_attributes_type":
        return f"{key}: must be a mapping of keys, not {item['input']!r}"
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:] if message else message
    if kind == "value_error":
        return f"{key}: {message}" if key else message
    shown = repr(item["input"])
    return f"{key}: {message}, not {shown if len(shown) < 80 else shown[:77] + '...'}"


def _dotted(where: Path_) -> str:
    return ".".join(str(part) for part in where)


def _hint_for(where: Path_) -> str:
    """The nearest key of the section, or the section that does have a key of this name."""
    word = str(where[-1])
    section = _model_at(where[:-1])
    if section is None:
        return ""
    owners = [name for name, model in _sections().items() if word in model.model_fields]
    if owners:
        return f"; it belongs to the section {owners[0]!r}"
    return did_you_mean(word, [name for name in section.model_fields if not (section is Recipe and name == "name")])


def _model_at(where: Path_) -> type[BaseModel] | None:
    if not where:
        return Recipe
    return _sections().get(str(where[0])) if len(where) == 1 else None


def _sections() -> dict[str, type[BaseModel]]:
    found: dict[str, type[BaseModel]] = {}
    for name, field in Recipe.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found[name] = kind
    return found


def _names(configs: Path) -> str:
    return ", ".join(file.stem for file in recipe_files(configs)) or "none"
