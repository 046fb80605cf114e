"""Floor plan of the repository: who may import whom, and how much a folder and a file may hold.

Imports inside functions and under TYPE_CHECKING count as any other. That nothing which the web server loads brings
torch along is tested in tests/assets/test_definitions.py.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pytest

from docs.tree import (
    PACKAGE,
    RESOURCES,
    TREES,
    Module,
    find_cycles,
    import_graph,
    measure_folders,
    read_tree,
    report,
    room_of,
)
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.fast

# Top down, the whole house and then the inside of a room. A module imports only its own room and rooms on lower floors:
# nothing from above, nothing from the neighbours on its floor. The rooms component and board are still to come.
FLOORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "": (
        ("definitions",),
        ("component",),
        ("cli", "board"),
        ("assets",),
        ("lineage", "resources"),
        ("worker",),
        ("training", "evaluation", "export"),
        ("data", "models"),
        ("chat", "store"),
        ("recipe", "machine"),
        ("inputs",),
        ("reporting",),
    ),
    "export": (
        ("preflight",),
        ("ollama",),
        ("parity",),
        ("merge", "gguf", "serving_commands"),
    ),
}
KNOWN_TO_NODES_ONLY = {"training", "evaluation", "export", "data"}  # lineage/nodes is where the graph meets them
DAGSTER = {"definitions", "component", "assets", "resources"}  # the rooms that may import Dagster
PIPES = "worker"  # reports to Dagster's parent process: dagster_pipes, nothing else of Dagster
WITH_CODE = {PACKAGE, f"{PACKAGE}.recipe", f"{PACKAGE}.cli"}  # these hand names on
DAGSTER_INTERNALS = "tests.support.dagster_internals"  # the only module that imports private names of Dagster
PRIVATE = re.compile(r"dagster_shared\b|dagster\w*\.(.*\.)?_(?!_)")
MOST_LINES = 420
MOST_THINGS = 14
LISTS_OF_ROOMS = {PACKAGE: 18, "tests": 20}  # these two list the rooms


@dataclass(frozen=True)
class Exemption:
    """Violations that are known, and what ends them; each must go from here as soon as it is gone from the tree."""

    since: date
    until: str
    violations: tuple[str, ...]


EXEMPTIONS = (
    Exemption(
        date(2026, 11, 24),
        "Dagster has a public judge of cron expressions: its croniter, which knows L and #, is private",
        ("finetune_assets/recipe/cron.py: imports dagster, which recipe may not",),
    ),
)


def violations(modules: list[Module]) -> set[str]:
    """Return every violation in a tree, each as `file: rule`."""
    rules = (imports_upwards, imports_heavy_rooms, imports_dagster, import_cycles, bad_inits, too_large)
    return {violation for rule in rules for violation in rule(modules)}


def imports_upwards(modules: list[Module]) -> Iterator[str]:
    """Find imports that do not go down, and rooms that are on no floor."""
    graph = import_graph(modules)
    for parent, floors in FLOORS.items():
        height = {room: -number for number, floor in enumerate(floors) for room in floor}
        for module in modules:
            room = room_in(parent, module.name)
            if not room or room_of(module.name) is None:
                continue
            if room not in height:
                yield f"{module.path}: {room} is on no floor"
                continue
            for imported in graph[module.name]:
                other = room_in(parent, imported)
                if other not in ("", room) and height.get(other, 1) >= height[room]:
                    yield f"{module.path}: imports {inside(imported)}, which is not below {room}"


def room_in(parent: str, name: str) -> str:
    """Return which room of a parent (or of the whole house) a module is in; empty if in none.

    What is outside the package is a room of the whole house by its first name: `resources`, `tests`.
    """
    prefix = f"{PACKAGE}.{parent}." if parent else f"{PACKAGE}."
    if name.startswith(prefix):
        return name.removeprefix(prefix).partition(".")[0]
    return "" if parent or name == PACKAGE else name.partition(".")[0]


def inside(name: str) -> str:
    """Return a module's name without that of the package."""
    return name.removeprefix(f"{PACKAGE}.")


def imports_heavy_rooms(modules: list[Module]) -> Iterator[str]:
    """Find modules of lineage, outside nodes, that import a room which only nodes may know."""
    graph = import_graph(modules)
    for module in modules:
        if room_of(module.name) == "lineage" and room_in("lineage", module.name) != "nodes":
            for imported in graph[module.name]:
                if room_of(imported) in KNOWN_TO_NODES_ONLY:
                    yield f"{module.path}: imports {inside(imported)}, which only lineage/nodes may"


def imports_dagster(modules: list[Module]) -> Iterator[str]:
    """Find imports of Dagster in rooms that know nothing of it, and of its private names anywhere."""
    for module in modules:
        room = room_of(module.name)
        for imported in module.imports:
            library = imported.partition(".")[0]
            if PRIVATE.match(imported) and module.name != DAGSTER_INTERNALS:
                yield f"{module.path}: imports {imported}, which is private"
            if room is None or room in DAGSTER or (room, library) == (PIPES, "dagster_pipes"):
                continue
            if library.startswith("dagster"):
                yield f"{module.path}: imports {library}, which {room} may not"


def import_cycles(modules: list[Module]) -> Iterator[str]:
    """Find modules that import each other."""
    paths = {module.name: module.path for module in modules}
    for first, *others in find_cycles(import_graph(modules)):
        yield f"{paths[first]}: imports in a circle with {', '.join(others)}"


def bad_inits(modules: list[Module]) -> Iterator[str]:
    """Find packages without an `__init__.py`, or with one that has code or, outside tests, no docstring."""
    folders = {module.path.parent for module in modules if module.path.parts[0] in TREES}
    for folder in folders - {module.path.parent for module in modules if module.is_init}:
        yield f"{folder}: has no __init__.py"
    for module in modules:
        if not module.is_init:
            continue
        docstring = ast.get_docstring(module.syntax) is not None
        if not docstring and module.path.parts[0] in (PACKAGE, RESOURCES):
            yield f"{module.path}: has no docstring"
        if len(module.syntax.body) > docstring and module.name not in WITH_CODE:
            yield f"{module.path}: has code"


def too_large(modules: list[Module]) -> Iterator[str]:
    """Find files of too many lines and folders of too many modules and subfolders."""
    for module in modules:
        if module.lines > MOST_LINES:
            yield f"{module.path}: has more than {MOST_LINES} lines"
    for name, folder in measure_folders(modules).items():
        if folder.things > (most := LISTS_OF_ROOMS.get(name, MOST_THINGS)):
            yield f"{name}: holds more than {most} things"


def exempted() -> set[str]:
    """Return every violation that is exempted."""
    return {violation for exemption in EXEMPTIONS for violation in exemption.violations}


@pytest.fixture(scope="module")
def current() -> set[str]:
    """Every violation in the repository."""
    return violations(read_tree(REPOSITORY, (*TREES, "bench", "docs")))


def test_the_repository_keeps_the_rules(current: set[str]):
    new = sorted(current - exempted())
    assert not new, "\n".join(new)


def test_no_exemption_outlives_its_violation(current: set[str]):
    gone = sorted(exempted() - current)
    assert not gone, "remove from EXEMPTIONS:\n" + "\n".join(gone)


def build(root: Path, files: dict[str, str]) -> list[Module]:
    """Write a tree, with an `__init__.py` in every package that has none, and read it."""
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
        for folder in path.relative_to(root).parents[:-1]:
            if not (init := root / folder / "__init__.py").exists():
                init.write_text('"""A room."""\n', encoding="utf-8")
    return read_tree(root)


HOUSE = {
    "finetune_assets/definitions.py": "from finetune_assets.assets import keys",
    "finetune_assets/assets/keys.py": "import dagster\nimport resources.gpu",
    "finetune_assets/lineage/graph.py": "from finetune_assets.lineage.nodes import raw",
    "finetune_assets/lineage/nodes/raw.py": "from finetune_assets.data.rows import read",
    "finetune_assets/worker/launch.py": "import dagster_pipes",
    "finetune_assets/training/sft.py": "from finetune_assets import __version__",
    "finetune_assets/export/ollama/create.py": "from ..gguf import make",
    "finetune_assets/export/gguf/make.py": "",
    "finetune_assets/data/rows.py": "def read(): ...",
    "resources/gpu.py": "from dagster import __version__",
    "tests/test_rows.py": "from finetune_assets.definitions import keys\nfrom finetune_assets.data import rows",
}


def test_a_house_in_order_breaks_no_rule(tmp_path: Path):
    assert violations(build(tmp_path, HOUSE)) == set()


BREACHES = [
    ("data/mix.py", "def f():\n    from ..training import sft", "imports training.sft, which is not below data"),
    ("data/mix.py", "if TYPE_CHECKING:\n    from ..assets import keys", "imports assets.keys, which is not below data"),
    ("data/mix.py", "from tests import test_rows", "imports tests.test_rows, which is not below data"),
    ("evaluation/run.py", "from ..training import sft", "imports training.sft, which is not below evaluation"),
    ("export/gguf/x.py", "from ..ollama import create", "imports export.ollama.create, which is not below gguf"),
    ("export/loose.py", "", "loose is on no floor"),
    ("attic/box.py", "from finetune_assets import definitions", "attic is on no floor"),
    ("lineage/plan.py", "from ..data.rows import read", "imports data.rows, which only lineage/nodes may"),
    ("recipe/cron.py", "def f():\n    import dagster as dg", "imports dagster, which recipe may not"),
    ("training/log.py", "import dagster_pipes", "imports dagster_pipes, which training may not"),
    ("worker/guard.py", "from dagster import job", "imports dagster, which worker may not"),
    ("assets/run.py", "from dagster import _core", "imports dagster._core, which is private"),
    ("assets/run.py", "import dagster_shared.x", "imports dagster_shared.x, which is private"),
    ("data/rows.py", "from finetune_assets.data import rows2", "imports in a circle with finetune_assets.data.rows2"),
    ("data/__init__.py", "", "has no docstring"),
    ("data/__init__.py", '"""Rows."""\nROWS = 3', "has code"),
    ("data/rows.py", "\n" * 421, "has more than 420 lines"),
]


@pytest.mark.parametrize(("name", "source", "rule"), BREACHES)
def test_a_breach_is_named(tmp_path: Path, name: str, source: str, rule: str):
    path = f"finetune_assets/{name}"
    other = {"finetune_assets/data/rows2.py": "from finetune_assets.data import rows"}
    assert f"{path}: {rule}" in violations(build(tmp_path, {**HOUSE, **other, path: source}))


def test_a_full_folder_and_a_folder_that_is_not_a_package_are_named(tmp_path: Path):
    files = {f"finetune_assets/data/rows{number}.py": "" for number in range(MOST_THINGS)}
    build(tmp_path, {**HOUSE, **files})
    (tmp_path / "finetune_assets/assets/__init__.py").unlink()
    assert violations(read_tree(tmp_path)) == {
        "finetune_assets/assets: has no __init__.py",
        "finetune_assets/data: holds more than 14 things",
    }


def test_two_trees_are_measured_side_by_side(tmp_path: Path):
    before, after = tmp_path / "before", tmp_path / "after"
    build(before, {"finetune_assets/a.py": "import finetune_assets.b", "finetune_assets/b.py": "from . import a"})
    twice = "from .. import b\nimport finetune_assets.b"
    build(after, {"finetune_assets/a/x.py": twice, "finetune_assets/b.py": ""})
    table = report([before, after])
    assert "| cycles of rooms | 2: a, b | none |" in table
    assert "| arrows between rooms, imports | 2, 2 | 1, 1 |" in table
    assert "| finetune_assets/a | - | - | - | 1 | 3 | x.py 2 |" in table
    assert "| b | a 1 | - |" in table
