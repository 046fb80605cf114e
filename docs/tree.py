"""Size and shape of a checkout: things per folder, lines, and which room imports which.

usage: python -m docs.tree [CHECKOUT [CHECKOUT]]
Without a checkout, prints the current folder. Two checkouts are printed side by side, as before and after.

Only Python files count. A room is a folder or a module directly in `finetune_assets`, or `resources`. A thing is a
module or a subfolder; `__init__.py` is not one, but its lines count. An import is a pair of modules, however often and
wherever the first names the second: inside functions and under TYPE_CHECKING too. An arrow is a pair of rooms.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

PACKAGE = "finetune_assets"
RESOURCES = "resources"
TREES = (PACKAGE, RESOURCES, "tests")
INIT = "__init__.py"


@dataclass(frozen=True)
class Module:
    """A Python file: its dotted name, its path in the checkout, and what it says."""

    name: str
    path: PurePosixPath
    lines: int
    syntax: ast.Module = field(repr=False, compare=False)

    @property
    def is_init(self) -> bool:
        return self.path.name == INIT

    @cached_property
    def imports(self) -> frozenset[str]:
        """The dotted names that it imports."""
        package = self.name if self.is_init else self.name.rpartition(".")[0]
        return frozenset(imported_names(self.syntax, package))


@dataclass(frozen=True)
class Folder:
    """A folder of modules; lines and largest file are those of its own files, not of its subfolders."""

    things: int
    lines: int
    largest: Module


def read_tree(root: Path, trees: Iterable[str] = TREES) -> list[Module]:
    """Read every module of a checkout, sorted by path."""
    return [read_module(root, path) for tree in trees for path in sorted((root / tree).rglob("*.py"))]


def read_module(root: Path, path: Path) -> Module:
    """Read one module of a checkout."""
    relative = PurePosixPath(path.relative_to(root))
    dotted = relative.parent if relative.name == INIT else relative.with_suffix("")
    source = path.read_text(encoding="utf-8")
    return Module(".".join(dotted.parts), relative, len(source.splitlines()), ast.parse(source, str(relative)))


def imported_names(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield what a module of the package imports; `from a import b` yields `a.b`, whether b is a module or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def import_graph(modules: Iterable[Module]) -> dict[str, set[str]]:
    """Map each module to the other modules of the checkout that it imports."""
    by_name = {module.name: module for module in modules}

    def owner(name: str) -> str:
        while name and name not in by_name:
            name = name.rpartition(".")[0]
        return name

    return {name: {owner(each) for each in module.imports} - {"", name} for name, module in by_name.items()}


def room_of(name: str) -> str | None:
    """Return the room of a module, or None for tests and for the package itself."""
    top, _, rest = name.partition(".")
    if top == PACKAGE:
        return rest.partition(".")[0] or None
    return top if top == RESOURCES else None


def count_arrows(graph: dict[str, set[str]]) -> Counter[tuple[str, str]]:
    """Count the imports from each room into each other room."""
    pairs = ((room_of(importer), room_of(imported)) for importer, names in graph.items() for imported in names)
    return Counter((above, below) for above, below in pairs if above and below and above != below)


def find_cycles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Return the largest groups of which each member imports every other, directly or by way of others."""
    reached = {name: _reachable(name, graph) for name in graph}
    groups = {
        tuple(sorted(other for other in reached[name] if name in reached.get(other, ())))
        for name in graph
        if name in reached[name]
    }
    return sorted(groups)


def _reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    """Return every name that can be reached from a name in one step or more."""
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        fresh = graph.get(waiting.pop(), set()) - reached
        reached |= fresh
        waiting += fresh
    return reached


def measure_folders(modules: Iterable[Module]) -> dict[str, Folder]:
    """Measure every folder that holds a module or a folder of modules."""
    files: dict[PurePosixPath, list[Module]] = {}
    for module in modules:
        files.setdefault(module.path.parent, []).append(module)
    folders = set(files)
    return {
        str(folder): Folder(
            sum(not module.is_init for module in own) + sum(other.parent == folder for other in folders),
            sum(module.lines for module in own),
            max(own, key=lambda module: module.lines),
        )
        for folder, own in sorted(files.items())
    }


def room_graph(arrows: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """Map each room to the rooms that it imports."""
    graph: dict[str, set[str]] = {}
    for above, below in arrows:
        graph.setdefault(above, set()).add(below)
    return graph


def totals(modules: list[Module]) -> dict[str, str]:
    """Return the figures of a whole checkout, as text by name."""
    graph = import_graph(modules)
    arrows = count_arrows(graph)
    folders = measure_folders(modules)
    fullest = max(folders, key=lambda name: folders[name].things)
    largest = max(modules, key=lambda module: module.lines)
    rooms = {room for module in modules if (room := room_of(module.name))}
    return {
        **{
            f"{tree}: files, lines": _sum(module for module in modules if module.path.parts[0] == tree)
            for tree in TREES
        },
        "folders": f"{len(folders)}",
        "fullest folder, things": f"{fullest} {folders[fullest].things}",
        "largest file, lines": f"{largest.path} {largest.lines}",
        "rooms": f"{len(rooms)}",
        "arrows between rooms, imports": f"{len(arrows)}, {sum(arrows.values())}",
        "cycles of rooms": _listed(find_cycles(room_graph(arrows))),
        "cycles of modules": _listed(find_cycles(graph)),
    }


def _sum(modules: Iterable[Module]) -> str:
    lines = [module.lines for module in modules]
    return f"{len(lines)}, {sum(lines):,}"


def _listed(cycles: list[tuple[str, ...]]) -> str:
    return "; ".join(f"{len(cycle)}: {', '.join(cycle)}" for cycle in cycles) or "none"


def folder_cells(modules: list[Module]) -> dict[str, tuple[str, ...]]:
    """Return things, lines and largest file of each folder."""
    return {
        name: (f"{folder.things}", f"{folder.lines:,}", f"{folder.largest.path.name} {folder.largest.lines}")
        for name, folder in measure_folders(modules).items()
    }


def arrow_cells(modules: list[Module]) -> dict[str, tuple[str, ...]]:
    """Return what each room imports, with the number of imports."""
    arrows = count_arrows(import_graph(modules))
    return {
        room: (", ".join(f"{below} {arrows[room, below]}" for below in sorted(rooms_below)),)
        for room, rooms_below in sorted(room_graph(arrows).items())
    }


def side_by_side(head: tuple[str, ...], sides: list[dict[str, tuple[str, ...]]]) -> str:
    """Return the rows of one or two checkouts as one Markdown table; the first column is their common name."""
    names = [""] if len(sides) == 1 else ["before: ", "after: "]
    columns = [head[0], *(f"{name}{column}" for name in names for column in head[1:])]
    missing = ("-",) * (len(head) - 1)
    rows = [
        [name, *(cell for side in sides for cell in side.get(name, missing))]
        for name in dict.fromkeys(name for side in sides for name in side)
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows])


def report(checkouts: list[Path]) -> str:
    """Return one checkout, or two side by side, as three Markdown tables."""
    trees = [read_tree(root) for root in checkouts]
    figures = [{name: (figure,) for name, figure in totals(tree).items()} for tree in trees]
    tables = [
        side_by_side(("figure", "value"), figures),
        side_by_side(("folder", "things", "lines", "largest file"), [folder_cells(tree) for tree in trees]),
        side_by_side(("room", "imports"), [arrow_cells(tree) for tree in trees]),
    ]
    return "\n\n".join(tables)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m docs.tree", description="Print size and shape of a checkout.")
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(), help="a checkout (default: this folder)")
    parser.add_argument("after", nargs="?", type=Path, help="a later checkout, printed beside the first")
    arguments = parser.parse_args()
    checkouts = [root for root in (arguments.checkout, arguments.after) if root is not None]
    for root in checkouts:
        if not (root / PACKAGE).is_dir():
            parser.error(f"{root} is not a checkout: it has no folder {PACKAGE}")
    print(report(checkouts))


if __name__ == "__main__":
    main()
