"""The page on the rooms of the package; the tree and the floors are read from the code.

usage: python -m docs.architecture > docs/architecture.md
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.whole.test_house import FLOORS, MOST_LINES, MOST_THINGS

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("finetune_assets", "resources")
PAGE = """# Architecture

Printed by `python -m docs.architecture`.

The package is a house with rooms. Each room is a folder with one subject. The `__init__.py` of a room says what is in
it, what is not, and which module is its *front door*: the module that other rooms import first.

## Floors

Imports go down only: a module imports its own room and rooms on lower floors. Rooms on the same floor do not import
each other. `tests/whole/test_house.py` reads all imports and fails when a rule breaks. The other rules:

- Rooms that do ML import neither Dagster nor `lineage`, `assets`, `worker` or `cli`.
- `lineage/nodes` is the only place in `lineage` that knows training, evaluation, export and data.
- A folder holds at most {things} things; a file has at most {lines} lines.
- Nothing that the web server imports loads torch.

```text
{floors}
```

Inside `export`:

```text
{export}
```

## The life of a row

1. `data/registry.py` finds its file by `dataset_info.json`. `raw_dataset` publishes a copy of the source files
   (`data/snapshot.py`).
2. `dataset_info` reads the row as a conversation (`data/formats/`), drops duplicates and counts (`data/prepare.py`).
   `data/split.py` puts it into train, validation or test by its content and the seed. Rows with the same question
   (case, punctuation and white space do not count) are in the same split.
3. `training/rows.py` renders it with the chat template (`chat/template.py`), tokenises it, masks what is not learnt and
   cuts it at `train.cutoff_len`.
4. `evaluation/` generates an answer to each test row and scores it. `export/parity/` compares distributions on the same
   rows for each GGUF file.

`data/rows.py` is the only reader of the split files.

## The life of a recipe key

1. `recipe/sections/` declares it: type, default, limits, description. `recipe/file.py` reads the YAML within limits and
   explains mistakes with file, line and key.
2. `lineage/nodes/<asset>.py` names the key in `reads` if the asset depends on it. So it becomes an ingredient of that
   asset's fingerprint, unless it equals the default.
3. `assets/<asset>.py` hands the value to a task of `worker/tasks/` or to a function of an ML room.
4. `docs/recipe.md` and `finetune schema` show it; both are made from the declaration.

## The life of an artifact

1. `lineage/plan.py` computes the wanted fingerprint from the ingredients and looks for it in
   `store/artifact_store.py`. The asset is fresh, stale or missing.
2. A run (`assets/step_asset.py`) calls `lineage/materialise.py`. The step writes into a staging folder. Heavy work runs
   in a child process (`worker/launch.py`), which reports typed events (`reporting/events.py`) over Dagster Pipes.
3. The store computes digests, writes `manifest.json` and renames the staging folder in one step.
4. `lineage/retention.py` removes it when no recipe wants it and nothing serves it.

## The tree

{tree}
"""


def page() -> str:
    """Return the page as text."""
    return PAGE.format(
        things=MOST_THINGS,
        lines=MOST_LINES,
        floors=_floors(""),
        export=_floors("export"),
        tree="\n".join(line for package in PACKAGES for line in _folder(PROJECT / package)),
    )


def _floors(parent: str) -> str:
    return "\n".join(", ".join(rooms) for rooms in FLOORS[parent])


def _folder(folder: Path) -> Iterator[str]:
    """List a folder, its modules and its subfolders with the first line of their docstrings."""
    yield f"### {folder.relative_to(PROJECT)}/\n\n{_docstring(folder / '__init__.py')}\n"
    modules = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    if modules:
        yield from (f"- `{path.name}`: {_docstring(path).splitlines()[0]}" for path in modules)
        yield ""
    for child in sorted(path.parent for path in folder.glob("*/__init__.py")):
        yield from _folder(child)


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


if __name__ == "__main__":
    print(page(), end="")
