"""The part of Go's text/template that our Ollama templates use, to check them without a server.

Covers text, `{{ range $i, $x := .List }}`, `{{ if }} / {{ else if }} / {{ else }}`, `{{ $x := ... }}`, fields, string
and integer literals, parentheses and the functions and, or, not, eq, ne, le, len, slice, index. No trim markers, no
pipes, no comments: what we do not write, we do not read. Reference: https://pkg.go.dev/text/template
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

TOKEN = re.compile(
    r"""\s*("(?:[^"\\]|\\.)*" | \( | \)(?:\.\w+)* | \$\w*(?:\.\w+)* | (?:\.\w+)+ | \.(?!\w) | \w+)\s*""", re.VERBOSE
)
FUNCTIONS: dict[str, Any] = {
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "not": lambda value: not value,
    "eq": lambda first, *others: any(first == other for other in others),
    "ne": lambda first, second: first != second,
    "le": lambda first, second: first <= second,
    "len": len,
    "slice": lambda value, start: value[start:],
    "index": lambda value, at: value[at],
}


@dataclass
class _Block:
    """A list of nodes: text, an expression's tokens, or ("if" | "range" | "set", ...)."""

    nodes: list[Any] = field(default_factory=list)


def render(template: str, data: dict[str, Any]) -> str:
    """The text that Go's text/template makes of `template` and `data`.

    Raises:
        ValueError: the template uses something that is not covered here, or is not well formed.
    """
    parts = re.split(r"\{\{(.*?)\}\}", template, flags=re.DOTALL)
    if parts[0::2] and any("{{" in text for text in parts[0::2]):
        raise ValueError("an action is not closed")
    source = iter(enumerate(parts))
    block, end = _parse(source)
    if end is not None:
        raise ValueError(f"{end!r} without a beginning")
    out: list[str] = []
    _execute(block, data, {"$": data}, out)
    return "".join(out)


def _parse(source: Any) -> tuple[_Block, str | None]:
    """Nodes up to the `else` or `end` that closes the block (returned too), or up to the template's end."""
    block = _Block()
    for number, part in source:
        action = part.strip()
        if number % 2 == 0:
            block.nodes.append(part)
        elif action == "end" or action == "else" or action.startswith("else if "):
            return block, action
        elif action.startswith("if "):
            block.nodes.append(_parse_if(action.removeprefix("if "), source))
        elif loop := re.fullmatch(r"range (\$\w+), (\$\w+) := (.+)", action):
            body, end = _parse(source)
            if end != "end":
                raise ValueError("a range is not closed")
            block.nodes.append(("range", loop[1], loop[2], _tokens(loop[3]), body))
        elif assignment := re.fullmatch(r"(\$\w+) := (.+)", action):
            block.nodes.append(("set", assignment[1], _tokens(assignment[2])))
        else:
            block.nodes.append(("put", _tokens(action)))
    return block, None


def _parse_if(condition: str, source: Any) -> tuple[Any, ...]:
    then, end = _parse(source)
    otherwise = _Block()
    if end is not None and end.startswith("else if "):
        otherwise.nodes.append(_parse_if(end.removeprefix("else if "), source))
    elif end == "else":
        otherwise, end = _parse(source)
        if end != "end":
            raise ValueError("an else is not closed")
    elif end != "end":
        raise ValueError("an if is not closed")
    return "if", _tokens(condition), then, otherwise


def _execute(block: _Block, dot: Any, variables: dict[str, Any], out: list[str]) -> None:
    for node in block.nodes:
        if isinstance(node, str):
            out.append(node)
        elif node[0] == "put":
            out.append(str(_value(node[1], dot, variables)))
        elif node[0] == "set":
            variables[node[1]] = _value(node[2], dot, variables)
        elif node[0] == "if":
            _execute(node[2] if _value(node[1], dot, variables) else node[3], dot, dict(variables), out)
        else:
            for at, item in enumerate(_value(node[3], dot, variables)):
                _execute(node[4], item, variables | {node[1]: at, node[2]: item}, out)


def _tokens(text: str) -> list[str]:
    """Literals, names with their fields (`$x.A`, `.A.B`), parentheses (the closing one with the fields behind it)."""
    tokens: list[str] = []
    at = 0
    while at < len(text):
        if (found := TOKEN.match(text, at)) is None:
            raise ValueError(f"cannot read {text!r}")
        tokens.append(found[1])
        at = found.end()
    return tokens


def _value(tokens: list[str], dot: Any, variables: dict[str, Any]) -> Any:
    rest = list(tokens)
    value = _call(rest, dot, variables)
    if rest:
        raise ValueError(f"cannot read {' '.join(tokens)!r}")
    return value


def _call(rest: list[str], dot: Any, variables: dict[str, Any]) -> Any:
    """A function with its arguments up to a closing parenthesis, or one operand."""
    if rest and rest[0] in FUNCTIONS:
        function = FUNCTIONS[rest.pop(0)]
        arguments = []
        while rest and not rest[0].startswith(")"):
            arguments.append(_operand(rest, dot, variables))
        return function(*arguments)
    return _operand(rest, dot, variables)


def _operand(rest: list[str], dot: Any, variables: dict[str, Any]) -> Any:
    token = rest.pop(0) if rest else ""
    if token == "(":
        value = _call(rest, dot, variables)
        if not rest or not rest[0].startswith(")"):
            raise ValueError("a parenthesis is not closed")
        return _fields(value, rest.pop(0).removeprefix(")"))
    if token.startswith('"'):
        return json.loads(token)  # our literals use the escapes that JSON and Go share
    if token.isdigit():
        return int(token)
    if token.startswith("."):
        return dot if token == "." else _fields(dot, token)
    name, _, fields = token.partition(".")
    if name not in variables:
        raise ValueError(f"unknown name {name!r}")
    return _fields(variables[name], f".{fields}" if fields else "")


def _fields(value: Any, path: str) -> Any:
    for name in path.split(".")[1:]:
        value = value[name]
    return value
