"""Registry of data sets, dataset_info.json: their names, files, formats and column names.

Its keys are those of LLaMA-Factory. An unknown key is an error, not ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from finetune_assets.data.files.by_suffix import READERS
from finetune_assets.data.files.json_file import read_json
from finetune_assets.inputs.pydantic_errors import Location, explain
from finetune_assets.inputs.regular_files import why_not_regular
from finetune_assets.recipe import Section, did_you_mean
from finetune_assets.reporting.errors import BadInput

REGISTRY = "dataset_info.json"
SHOWN = 10  # problems listed


class Columns(Section):
    """Names of the columns of alpaca rows; a column that is not given keeps its usual name."""

    prompt: str = "instruction"
    query: str = "input"
    response: str = "output"
    system: str = "system"
    history: str = "history"


class Entry(Section):
    """Registry entry of one data set."""

    file_name: str = Field(max_length=1000)
    formatting: Literal["alpaca"] = "alpaca"
    columns: Columns = Field(default_factory=Columns)


def load_entries(folder: Path, names: list[str]) -> dict[str, Entry]:
    """Return the registry entries of the named data sets.

    Raises:
        BadInput: there is no registry, a name is not in it, or an entry is invalid.
    """
    path = folder / REGISTRY
    registry = read_json(path)
    if not isinstance(registry, dict):
        raise BadInput(f"{path}: must be an object: data set name -> entry")
    problems: list[str] = []
    entries: dict[str, Entry] = {}
    for name in names:
        if len(problems) > SHOWN:
            problems.append("... and perhaps more like these")
            break
        if name not in registry:
            problems.append(f"{path}: no data set {name!r}{did_you_mean(name, registry)}")
            continue
        try:
            entries[name] = Entry.model_validate(registry[name])
        except ValidationError as error:
            problems += [f"{path}: {name}: {explain(item, _suggestion)}" for item in error.errors()]
    if problems:
        raise BadInput("\n".join(problems))
    return entries


def data_file(folder: Path, entry: Entry) -> Path:
    """Return the path of an entry's file, which is inside the data folder.

    Raises:
        BadInput: it does not exist, is not a regular file, is outside the folder, or has no reader.
    """
    try:
        path = (folder / entry.file_name).resolve()
    except (OSError, RuntimeError) as error:  # a loop of symbolic links
        raise BadInput(f"{folder / REGISTRY}: file_name {entry.file_name!r} cannot be followed: {error}") from None
    if not path.is_relative_to(folder.resolve()):
        raise BadInput(f"{folder / REGISTRY}: file_name {entry.file_name!r} leaves the data folder")
    if (why := why_not_regular(path)) is not None:
        raise BadInput(f"{path}: {why}", f"{folder / REGISTRY} names it as file_name")
    if path.suffix not in READERS:
        raise BadInput(f"{path}: only {' and '.join(READERS)} files can be read", "convert the file to JSON Lines")
    return path


def _suggestion(location: Location) -> str:
    owner = Columns if location[0] == "columns" else Entry
    return did_you_mean(str(location[-1]), owner.model_fields)
