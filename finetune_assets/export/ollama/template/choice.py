"""Which template an Ollama server renders prompts with: the model's TEMPLATE, or the chat template in the GGUF file.

Servers since 0.30 choose, by what the texts of the two seem able to do. This is their rule as it stands in Ollama's
source (v0.33, August 2026: server/images.go, thinking/template.go), not a guess from behaviour.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from finetune_assets.export.ollama.server.releases import CHOOSES, KNOWS_HARMONY, release
from finetune_assets.export.ollama.template.go_parse import Action, Branch, Node, Operand, Pipe, Text, parse

Path = Literal["template", "jinja", "server"]
Setting = Literal["0", "1"]

BUILT_IN = {"gemma4", "laguna", "nemotron_h", "nemotron_h_moe", "nemotron_h_omni"}  # with a renderer of the server's
HARMONY = {"gptoss", "gpt-oss"}
HARMONY_MARKS = ("<|start|>", "<|end|>")
ROLE_TOOL = [f"role{a}] == {b}tool{b}" for a in "'\"" for b in "'\""] + [f"message.role == {b}tool{b}" for b in "'\""]
RESULTS_IN_JINJA = ("tool_response", "tool_results", *ROLE_TOOL, "ipython")
RESULTS_IN_GO = ('eq .Role "tool"', "tool_response", "TOOL_RESULTS")


@dataclass(frozen=True)
class Choice:
    """What a server renders prompts with.

    Attributes:
        path: template (our TEMPLATE), jinja (the GGUF file's chat template, rendered by llama.cpp), or server (code of
            the server's own, which follows neither).
        reason: why, in words.
    """

    path: Path
    reason: str


def served_by(
    version: str | None,
    go_template: str | None,
    jinja: str | None,
    architecture: str,
    setting: Setting | None = None,
) -> Choice:
    """Return what a server renders the prompts of a model with.

    Args:
        version: the server's, as /api/version reports it; None stands for a current one.
        go_template: the model's TEMPLATE, if it has one.
        jinja: the GGUF file's tokenizer.chat_template, if it has one.
        architecture: the GGUF file's general.architecture.
        setting: OLLAMA_GO_TEMPLATE on the server, if it is set.

    Raises:
        ValueError: the TEMPLATE is not one that a server would take, or uses syntax that `go_parse` does not cover.
    """
    number = release(version) or CHOOSES  # a build from source behaves as a current release
    harmony = architecture in HARMONY and go_template is not None and all(mark in go_template for mark in HARMONY_MARKS)
    if harmony and number >= KNOWS_HARMONY:
        return Choice("server", f"the server renders {architecture} models itself (harmony)")
    if number < CHOOSES:
        return Choice("template", f"Ollama {version} always follows TEMPLATE")
    if architecture in BUILT_IN:
        return Choice("server", f"the server renders {architecture} models itself")
    if go_template is None:
        return Choice("jinja", "the model has no TEMPLATE")
    if jinja is None:
        return Choice("template", "the GGUF file has no chat template")
    if setting is not None:
        path: Path = "template" if setting == "1" else "jinja"
        return Choice(path, f"OLLAMA_GO_TEMPLATE={setting} is set on the server")
    return _chosen(go_template, jinja)


def jinja_capabilities(jinja: str) -> frozenset[str]:
    """Return what the chat template seems able to do: tools, thinking. Found by text search."""
    found = set()
    if "tools" in jinja or "tool_call" in jinja:
        found.add("tools")
    splits = any(f"content.split({quote}</think>{quote})" in jinja for quote in "'\"")
    tags = "<think>" in jinja and "</think>" in jinja
    if tags or (splits and "reasoning_content" not in jinja and "<SPECIAL_12>" not in jinja):
        found.add("thinking")
    return frozenset(found)


def jinja_round_trip(jinja: str) -> bool:
    """Return whether the chat template seems to write tool calls and tool results."""
    calls = "tool_calls" in jinja or "assistant_tool_call" in jinja
    return "tools" in jinja_capabilities(jinja) and calls and any(text in jinja for text in RESULTS_IN_JINJA)


def go_capabilities(go_template: str) -> frozenset[str]:
    """Return what the TEMPLATE seems able to do: tools, insert, thinking. Found in its syntax tree."""
    nodes = parse(go_template)
    names = _names(nodes)
    found = {name for name, variable in (("tools", "tools"), ("insert", "suffix")) if variable in names}
    return frozenset(found | ({"thinking"} if all(_thinking_tags(nodes)) else set()))


def go_round_trip(go_template: str) -> bool:
    """Return whether the TEMPLATE seems to write tool calls and tool results."""
    return {"tools", "toolcalls"} <= _names(parse(go_template)) and any(text in go_template for text in RESULTS_IN_GO)


def _chosen(go_template: str, jinja: str) -> Choice:
    ours, theirs = go_capabilities(go_template), jinja_capabilities(jinja)
    if len(theirs) > len(ours):
        if go_round_trip(go_template) and not jinja_round_trip(jinja):
            return Choice("template", "TEMPLATE writes tool calls and their results, the chat template does not")
        more = " and ".join(sorted(theirs - ours))
        return Choice("jinja", f"the chat template can do more than TEMPLATE ({more})")
    if ours == theirs and "tools" in ours and jinja_round_trip(jinja) and not go_round_trip(go_template):
        return Choice("jinja", "the chat template writes tool calls and their results, TEMPLATE does not")
    return Choice("template", "TEMPLATE can do all that the chat template can")


def _names(nodes: tuple[Node, ...]) -> set[str]:
    """Return names of fields and variables in lower case, without those behind a parenthesis, as servers do."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, Action):
            found |= _names_in(node.pipe)
        elif isinstance(node, Branch):
            found |= _names_in(node.pipe) | _names(node.then) | _names(node.otherwise)
    return found


def _names_in(pipe: Pipe) -> set[str]:
    found: set[str] = set()
    for operand in (operand for command in pipe.commands for operand in command):
        if operand.kind in ("field", "variable"):
            found |= {name.lower() for name in operand.names}
        # A parenthesis with fields behind it is another kind of node (a chain), which servers do not look into.
        elif operand.pipe is not None and not operand.names:
            found |= _names_in(operand.pipe)
    return found


def _thinking_tags(nodes: tuple[Node, ...]) -> tuple[str, str]:
    """Return the texts around a model's thinking, as a server infers them.

    They are the first and last of the list of nodes nearest to `.Thinking`, within a range over `.Messages`. Empty
    where there is none.
    """
    opening = closing = ""
    for around in _thinking_lists(nodes, None):
        first, last = around[0], around[-1]
        opening = first.text.strip() if isinstance(first, Text) else opening
        closing = last.text.strip() if isinstance(last, Text) else closing
    return opening, closing


def _thinking_lists(nodes: tuple[Node, ...], loop: Branch | None) -> Iterator[tuple[Node, ...]]:
    for node in nodes:
        if isinstance(node, Text):
            continue
        inner = node if isinstance(node, Branch) and node.kind == "range" else loop
        over_messages = inner is not None and any("Messages" in one.names[:1] for one in _fields(inner.pipe))
        if over_messages and any(one.names[:1] == ("Thinking",) for one in _fields(node.pipe)):
            yield nodes
        if isinstance(node, Branch):
            yield from _thinking_lists(node.then, inner)
            yield from _thinking_lists(node.otherwise, inner)


def _fields(pipe: Pipe) -> Iterator[Operand]:
    for operand in (operand for command in pipe.commands for operand in command):
        if operand.kind == "field":
            yield operand
        elif operand.pipe is not None and not operand.names:
            yield from _fields(operand.pipe)
