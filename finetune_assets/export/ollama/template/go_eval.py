"""The part of Go's text/template that derived TEMPLATEs use, evaluated without a server.

Covers text, `{{ range $i, $x := .List }}`, if, else, `{{ $x := ... }}`, fields, literals, parentheses and the functions
below. Trim markers, pipes and `with` raise ValueError: `derive` does not write them. Reference:
https://pkg.go.dev/text/template
"""

from __future__ import annotations

from typing import Any

from finetune_assets.export.ollama.template.go_parse import Action, Branch, Node, Operand, Pipe, Text, parse

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


def render(template: str, data: dict[str, Any]) -> str:
    """Return the text that Go's text/template makes of `template` and `data`.

    Raises:
        ValueError: the template uses something that is not covered here, or is not well formed.
    """
    texts: list[str] = []
    _execute(parse(template, trim_markers=False), data, {"$": data}, texts)
    return "".join(texts)


def _execute(nodes: tuple[Node, ...], dot: Any, variables: dict[str, Any], texts: list[str]) -> None:
    for node in nodes:
        if isinstance(node, Text):
            texts.append(node.text)
        elif isinstance(node, Action):
            _act(node, dot, variables, texts)
        elif node.kind == "if" and not node.pipe.variables:
            chosen = node.then if _value(node.pipe, dot, variables) else node.otherwise
            _execute(chosen, dot, dict(variables), texts)
        elif node.kind == "range":
            _repeat(node, dot, variables, texts)
        else:
            raise ValueError(f"{node.kind} is not covered in this form")


def _act(action: Action, dot: Any, variables: dict[str, Any], texts: list[str]) -> None:
    value = _value(action.pipe, dot, variables)
    if not action.pipe.variables:
        texts.append(str(value))
    elif action.pipe.declares and len(action.pipe.variables) == 1:
        variables[action.pipe.variables[0]] = value
    else:
        raise ValueError("an assignment in this form is not covered")


def _repeat(loop: Branch, dot: Any, variables: dict[str, Any], texts: list[str]) -> None:
    if len(loop.pipe.variables) != 2 or not loop.pipe.declares or loop.otherwise:
        raise ValueError("a range in this form is not covered")
    number, element = loop.pipe.variables
    for at, item in enumerate(_value(loop.pipe, dot, variables)):
        _execute(loop.then, item, variables | {number: at, element: item}, texts)


def _value(pipe: Pipe, dot: Any, variables: dict[str, Any]) -> Any:
    """Return what a function makes of its arguments, or one operand."""
    if len(pipe.commands) != 1:
        raise ValueError("pipes are not covered")
    first, *arguments = pipe.commands[0]
    if first.kind == "function" and first.names[0] in FUNCTIONS:
        return FUNCTIONS[first.names[0]](*(_operand(argument, dot, variables) for argument in arguments))
    if arguments:
        raise ValueError("only a function takes arguments")
    return _operand(first, dot, variables)


def _operand(operand: Operand, dot: Any, variables: dict[str, Any]) -> Any:
    if operand.kind == "literal":
        return operand.value
    if operand.kind == "field":
        return _fields(dot, operand.names)
    if operand.pipe is not None:
        return _fields(_value(operand.pipe, dot, variables), operand.names)
    name, fields = operand.names[0], operand.names[1:]
    if name not in variables:
        raise ValueError(f"unknown name {name!r}")
    return _fields(variables[name], fields)


def _fields(value: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        value = value[name]
    return value
