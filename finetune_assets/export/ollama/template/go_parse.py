"""Go template syntax (text/template/parse) as a tree: what a server finds when it looks into a TEMPLATE.

Covers text, actions, if, with, range, else, variables, pipes, fields, parentheses, literals, comments and trim markers.
define, block, template, break and continue raise ValueError. Reference: https://pkg.go.dev/text/template
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

TOKEN = re.compile(
    r"""\s*(?:(?P<text>"(?:[^"\\\n]|\\.)*"|`[^`]*`)|(?P<set>:=|=)|(?P<mark>[(),|])|(?P<number>-?\d+)(?!\w)
    |(?P<variable>\$\w*)|(?P<field>\.[A-Za-z_]\w*)|(?P<dot>\.)(?!\w)|(?P<name>[A-Za-z_]\w*))""",
    re.VERBOSE,
)
BLOCKS = ("if", "with", "range")


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Operand:
    """A part of a command.

    Attributes:
        kind: field (`.A.B`; `names` has no entry for the dot alone), variable (`$x.A`; its name is the first of
            `names`), function, literal, or pipe: in parentheses, with the fields behind them in `names`.
    """

    kind: Literal["field", "variable", "function", "literal", "pipe"]
    names: tuple[str, ...] = ()
    value: str | int | bool | None = None
    pipe: Pipe | None = None


@dataclass(frozen=True)
class Pipe:
    """`$x, $y := command | command`."""

    variables: tuple[str, ...]
    declares: bool
    commands: tuple[tuple[Operand, ...], ...]


@dataclass(frozen=True)
class Action:
    pipe: Pipe


@dataclass(frozen=True)
class Branch:
    """if, with or range."""

    kind: str
    pipe: Pipe
    then: tuple[Node, ...]
    otherwise: tuple[Node, ...]


Node = Text | Action | Branch


def parse(template: str, *, trim_markers: bool = True) -> tuple[Node, ...]:
    """Return the nodes of a template.

    Args:
        trim_markers: False refuses `{{-` and `-}}`.

    Raises:
        ValueError: the template is not well formed, or uses what is not covered here.
    """
    source = _pieces(template, trim_markers)
    nodes, end = _block(source)
    if end is not None:
        raise ValueError(f"{end!r} without a beginning")
    return nodes


def _pieces(template: str, trim_markers: bool) -> Iterator[tuple[bool, str]]:
    """Yield (is an action, text) in turn, trimmed where markers say so."""
    at, trim = 0, False
    while True:
        start = template.find("{{", at)
        text = template[at:] if start < 0 else template[at:start]
        text = text.lstrip(" \t\r\n") if trim else text
        if start < 0:
            yield False, text
            return
        begin = start + 2
        if re.match(r"-\s", template[begin:]):
            text, begin = text.rstrip(" \t\r\n"), begin + 1
        yield False, text
        end = _close(template, begin)
        action = template[begin:end]
        trim = re.search(r"\s-$", action) is not None
        if not trim_markers and (trim or begin > start + 2):
            raise ValueError("trim markers are not covered")
        yield True, (action[:-1] if trim else action).strip()
        at = end + 2


def _close(template: str, at: int) -> int:
    """Return where the action that begins at `at` ends; braces in its strings and comments do not count."""
    if (comment := re.match(r"\s*/\*.*?\*/\s*-?(?=\}\})", template[at:], re.DOTALL)) is not None:
        return at + comment.end()
    while at < len(template):
        if template.startswith("}}", at):
            return at
        quoted = re.match(r'"(?:[^"\\\n]|\\.)*"|`[^`]*`', template[at:])
        at += quoted.end() if quoted else 1
    raise ValueError("an action is not closed")


def _block(source: Iterator[tuple[bool, str]]) -> tuple[tuple[Node, ...], str | None]:
    """Return the nodes up to the `else` or `end` that closes the block (returned too), or up to the template's end."""
    nodes: list[Node] = []
    for is_action, text in source:
        word, _, rest = text.partition(" ")
        if not is_action:
            if text:
                nodes.append(Text(text))
        elif word in ("end", "else"):
            return tuple(nodes), text
        elif word in BLOCKS:
            nodes.append(_branch(word, rest, source))
        elif not text.startswith("/*"):
            nodes.append(Action(_pipe(text)))
    return tuple(nodes), None


def _branch(kind: str, pipe: str, source: Iterator[tuple[bool, str]]) -> Branch:
    then, end = _block(source)
    otherwise: tuple[Node, ...] = ()
    word, _, condition = (end or "").removeprefix("else ").partition(" ")
    if end is not None and end.startswith("else ") and word == kind != "range":
        otherwise = (_branch(kind, condition, source),)
    elif end == "else":
        otherwise, end = _block(source)
        if end != "end":
            raise ValueError(f"an else of {kind} is not closed")
    elif end != "end":
        raise ValueError(f"{kind} is not closed")
    return Branch(kind, _pipe(pipe), then, otherwise)


def _pipe(text: str) -> Pipe:
    tokens = _tokens(text)
    pipe = _read_pipe(tokens)
    if tokens:
        raise ValueError(f"cannot read {text!r}")
    return pipe


def _tokens(text: str) -> list[tuple[str, str, bool]]:
    """Return tokens: kind, text, and whether it follows the token before it without a space."""
    tokens: list[tuple[str, str, bool]] = []
    at = 0
    while at < len(text.rstrip()):
        if (found := TOKEN.match(text, at)) is None:
            raise ValueError(f"cannot read {text!r}")
        kind = str(found.lastgroup)
        tokens.append((kind, found[kind], found.start(kind) == at))
        at = found.end()
    return tokens


def _read_pipe(tokens: list[tuple[str, str, bool]]) -> Pipe:
    variables: list[str] = []
    declares = False
    at = next((at for at, (kind, _, _) in enumerate(tokens) if kind == "set"), None)
    if at is not None:
        variables = [text for kind, text, _ in tokens[:at] if kind == "variable"]
        if len(variables) * 2 - 1 != at or len(variables) > 2:
            raise ValueError("cannot read an assignment")
        declares = tokens[at][1] == ":="
        del tokens[: at + 1]
    commands = [_command(tokens)]
    while tokens and tokens[0][1] == "|":
        tokens.pop(0)
        commands.append(_command(tokens))
    return Pipe(tuple(variables), declares, tuple(commands))


def _command(tokens: list[tuple[str, str, bool]]) -> tuple[Operand, ...]:
    operands: list[Operand] = []
    while tokens and tokens[0][1] not in (")", "|"):
        operands.append(_operand(tokens))
    if not operands:
        raise ValueError("a command is missing")
    return tuple(operands)


def _operand(tokens: list[tuple[str, str, bool]]) -> Operand:
    kind, text, _ = tokens.pop(0)
    if text == "(" and kind == "mark":
        inner = _read_pipe(tokens)
        if not tokens or tokens.pop(0)[1] != ")":
            raise ValueError("a parenthesis is not closed")
        return Operand("pipe", _fields(tokens), pipe=inner)
    if kind == "text":
        return Operand("literal", value=text[1:-1] if text.startswith("`") else json.loads(text))
    if kind == "number":
        return Operand("literal", value=int(text))
    if kind == "name" and text in ("true", "false", "nil"):
        return Operand("literal", value={"true": True, "false": False}.get(text))
    if kind == "name":
        return Operand("function", (text,))
    if kind == "dot":
        return Operand("field")
    if kind == "field":
        return Operand("field", (text[1:], *_fields(tokens)))
    if kind == "variable":
        return Operand("variable", (text, *_fields(tokens)))
    raise ValueError(f"cannot read {text!r}")


def _fields(tokens: list[tuple[str, str, bool]]) -> tuple[str, ...]:
    names: list[str] = []
    while tokens and tokens[0][0] == "field" and tokens[0][2]:
        names.append(tokens.pop(0)[1][1:])
    return tuple(names)
