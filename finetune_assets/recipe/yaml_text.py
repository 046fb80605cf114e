"""Recipe files as YAML: the values, and the line of each key, within limits far above any real recipe.

YAML allows more than a recipe needs, and its constructors raise errors of every kind. Here a document is a tree of
mappings, lists, texts, numbers, true, false and null. Everything else is refused with its line and key: dates, binary
values, Python objects, keys that are not texts, recursive aliases.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from finetune_assets.inputs.pydantic_errors import Location, dotted
from finetune_assets.inputs.regular_files import read_utf8
from finetune_assets.reporting.errors import BadInput

BYTES = 256_000  # a recipe has about two thousand
NODES = 10_000  # keys and values; each use of an alias counts
DEPTH = 20  # a recipe has four levels
NUMBER = 100  # characters of a number
TAG = "tag:yaml.org,2002:"
MERGE = TAG + "merge"
SCALARS = {TAG + name for name in ("str", "int", "float", "bool", "null")}
NAMES = {TAG + "timestamp": "a date", TAG + "binary": "a binary value", TAG + "value": "a lone '='"}


class Document:
    """One recipe file.

    Attributes:
        value: the content; None if the file is empty or has problems.
        lines: the line of every key.
        problems: line and text of each.
    """

    def __init__(self, path: Path):
        """Read and check a file.

        Raises:
            BadInput: the file cannot be read, or is not YAML.
        """
        self.value: Any = None
        self.lines: dict[Location, int] = {}
        self.problems: list[tuple[int, str]] = []
        self._left = NODES
        self._path = path
        self._loader = yaml.SafeLoader("")
        node = _compose(read_utf8(path, BYTES), path)
        if node is None:
            return
        try:
            self._walk(node, (), ())
        except _TooMuch as error:
            self.problems.append((error.line, str(error)))
        if not self.problems:
            self.value = self._construct(node)

    def line(self, location: Location) -> int:
        """Return the line of a key, or of the nearest key above it."""
        while location and location not in self.lines:
            location = location[:-1]
        return self.lines.get(location, 1)

    def _walk(self, node: yaml.Node, location: Location, above: tuple[int, ...]) -> None:
        """Check a node and everything below it, once for each use of an alias."""
        line = node.start_mark.line + 1
        self._left -= 1
        if id(node) in above:
            raise _TooMuch(line, f"{_dotted(location)}: the alias refers to a value that contains it")
        if self._left < 0:
            raise _TooMuch(line, f"more than {NODES} keys and values (each use of an alias counts)")
        if len(above) >= DEPTH:
            raise _TooMuch(line, f"nested more than {DEPTH} levels deep")
        self.lines.setdefault(location, line)
        inside = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            self._tag(node, TAG + "map", location)
            for key, value in node.value:
                self._key(key, location)
                self._walk(value, (*location, _word(key)), inside)
        elif isinstance(node, yaml.SequenceNode):
            self._tag(node, TAG + "seq", location)
            for index, value in enumerate(node.value):
                self._walk(value, (*location, index), inside)
        else:
            self._scalar(node, location)

    def _key(self, key: yaml.Node, location: Location) -> None:
        self._left -= 1
        line, inner = key.start_mark.line + 1, (*location, _word(key))
        if not isinstance(key, yaml.ScalarNode) or key.tag not in (TAG + "str", MERGE):
            self.problems.append((line, f"{_dotted(inner)}: a key must be a text; put it in quotes"))
        elif (why := _unprintable(key.value)) is not None:
            self.problems.append((line, f"{key.value!a}: the key contains {why}"))
        elif key.tag == TAG + "str" and inner in self.lines:
            self.problems.append((line, f"{_dotted(inner)}: given twice (first in line {self.lines[inner]})"))
        self.lines[inner] = line

    def _tag(self, node: yaml.Node, expected: str, location: Location) -> None:
        if node.tag != expected:
            kind = "a mapping" if isinstance(node, yaml.MappingNode) else "a list"
            line = node.start_mark.line + 1
            self.problems.append(
                (line, f"{_dotted(location)}: {kind} with the tag {_tag_text(node.tag)}: remove the tag")
            )

    def _scalar(self, node: yaml.Node, location: Location) -> None:
        line, shown = node.start_mark.line + 1, _shown(node.value)
        if node.tag not in SCALARS:
            what = NAMES.get(node.tag) or f"a value with the tag {_tag_text(node.tag)}"
            self.problems.append((line, f"{_dotted(location)}: {shown} reads as {what}: put it in quotes"))
        elif node.tag in (TAG + "int", TAG + "float") and len(node.value) > NUMBER:
            text = f"{_dotted(location)}: a number of {len(node.value)} characters (limit {NUMBER})"
            self.problems.append((line, text))
        elif (why := _unprintable(node.value)) is not None:
            self.problems.append((line, f"{_dotted(location)}: the text contains {why}"))
        else:
            try:
                self._loader.construct_object(node)
            except Exception:  # constructors raise what int(), float() and their tables raise
                text = f"{_dotted(location)}: {shown} is not {_tag_text(node.tag)}: write another value"
                self.problems.append((line, text))

    def _construct(self, node: yaml.Node) -> Any:
        try:
            return yaml.SafeLoader("").construct_document(node)
        except yaml.MarkedYAMLError as error:
            raise _not_yaml(self._path, error) from None
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise BadInput(f"{self._path}: not valid YAML: {error}") from None


class _TooMuch(Exception):
    def __init__(self, line: int, text: str):
        self.line = line
        super().__init__(text)


class _Limited(yaml.SafeLoader):
    """A loader that stops at the limit, before a large file takes seconds."""

    composed = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        self.composed += 1
        if self.composed > NODES:
            raise _TooMuch(self.line + 1, f"more than {NODES} keys and values")
        return super().compose_node(parent, index)


def _compose(text: str, path: Path) -> yaml.Node | None:
    loader = None
    try:
        loader = _Limited(text)
        return loader.get_single_node()
    except _TooMuch as error:
        raise BadInput(f"{path}:{error.line}: {error}") from None
    except yaml.MarkedYAMLError as error:
        raise _not_yaml(path, error) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = f"the character U+{ord(text[error.position]):04X}" if error.position < len(text) else error.reason
        raise BadInput(f"{path}:{line}: not valid YAML: contains {character}") from None
    except RecursionError:
        raise BadInput(f"{path}: nested more than {DEPTH} levels deep") from None
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError) as error:
        where = f":{loader.line + 1}:{loader.column + 1}" if loader is not None else ""
        raise BadInput(f"{path}{where}: not valid YAML: {error}") from None


def _not_yaml(path: Path, error: yaml.MarkedYAMLError) -> BadInput:
    mark = error.problem_mark or error.context_mark
    where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
    context = f"{error.context}, " if (error.context or "").startswith("expected a single") else ""
    return BadInput(f"{path}{where}: not valid YAML: {context}{error.problem or error}")


def _word(key: yaml.Node) -> str:
    return _shown(key.value) if isinstance(key, yaml.ScalarNode) else "?"


def _unprintable(text: str) -> str | None:
    """Return what a text contains that files or other programs cannot hold; None if nothing."""
    if "\0" in text:
        return "a NUL character"
    return "a lone surrogate" if any("\ud800" <= char <= "\udfff" for char in text) else None


def _tag_text(tag: str) -> str:
    return _shown("!!" + tag.removeprefix(TAG) if tag.startswith(TAG) else tag)


def _shown(text: str) -> str:
    """Shorten a text to a line."""
    return text if len(text) <= 60 else text[:57] + "..."


def _dotted(location: Location) -> str:
    return dotted(location) or "the recipe"
