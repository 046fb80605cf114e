"""Both ways in which an Ollama server may make a prompt, compared with training's before anything is trained.

TEMPLATE is rendered by `go_eval` while it is derived (`derive`). The chat template of the GGUF file is rendered
here by llama.cpp's engine, which is the one inside current servers, asked in the way in which such a server asks it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_assets.chat.rendering import render_jinja
from finetune_assets.export.gguf.bare_file import CONTEXT, write_bare
from finetune_assets.export.gguf.chat_metadata import adds_bos, special_tokens
from finetune_assets.export.ollama.template.choice import Choice, jinja_capabilities, served_by
from finetune_assets.export.ollama.template.derive import GoTemplate, battery, derive, differs
from finetune_assets.models.engines.llama_cpp_probe import ProbeEngine
from finetune_assets.models.formats.gguf import read_head
from finetune_assets.reporting.errors import StepFailed

ORDINARY = "ordinary"
TOOLS, CALLS = "tools", "tool calls and their results"
Talk = list[dict[str, Any]]


@dataclass(frozen=True)
class Proof:
    """What servers make of a chat template.

    Attributes:
        template: the TEMPLATE, which renders every ordinary conversation as training does.
        current: what a current server renders prompts with.
        jinja: kind of conversation -> how llama.cpp renders it otherwise than training does. Kinds that are missing
            are rendered in the same way.
    """

    template: GoTemplate
    current: Choice
    jinja: Mapping[str, str]

    @property
    def problem(self) -> str | None:
        """Why a current server makes other prompts than training of an ordinary conversation; None if it does not."""
        if self.current.path == "jinja" and ORDINARY in self.jinja:
            return (
                f"current Ollama servers render this chat template otherwise than training does: {self.jinja[ORDINARY]}"
            )
        return None

    @property
    def way(self) -> str:
        """How servers of each release make prompts, in words."""
        said = {"template": "TEMPLATE", "jinja": "the chat template in the GGUF file", "server": "code of their own"}
        proven = "the prompts of both were compared with training's"
        if self.current.path == "server":
            proven = "TEMPLATE was compared with training, the servers' own code was not"
        since = f"later releases with {said[self.current.path]} ({self.current.reason})"
        return f"Ollama before 0.30 renders prompts with TEMPLATE, {since}; {proven}"

    @property
    def notes(self) -> list[str]:
        """What is rendered otherwise than in training."""
        others = [kind for kind in self.jinja if kind != ORDINARY and self.current.path == "jinja"]
        new = [f"{kind}: rendered differently by Ollama since 0.30" for kind in others]
        return [*self.template.notes, *([self.problem] if self.problem else []), *new]


def prove(
    engine: ProbeEngine,
    template: str,
    specials: Mapping[str, str],
    *,
    add_bos: bool,
    architecture: str,
    system: str | None = None,
) -> Proof:
    """Render conversations in each way that a server may take, and compare them with training's prompts.

    Args:
        engine: a GGUF file with this chat template, opened with pure=False.
        specials: bos_token, eos_token, ... as the tokenizer names them.
        add_bos: servers put the begin-of-text token before every prompt.
        architecture: of the model that is to be served.
        system: the system message that it is to be served with.

    Raises:
        StepFailed: no TEMPLATE renders every ordinary conversation as training does, with the reason.
    """
    go = derive(template, specials, add_bos=add_bos, system=system)
    current = served_by(None, go.text, template, architecture)
    return Proof(go, current, differences(engine, template, specials, add_bos=add_bos))


def prove_file(gguf: Path, system: str | None = None) -> Proof:
    """Run `prove` for a GGUF file's chat template. Its weights are not read.

    Raises:
        StepFailed: as `prove`; or the file has no chat template, or llama.cpp cannot read its tokenizer.
    """
    head = read_head(gguf)
    template = head.get("tokenizer.chat_template")
    if not template:
        raise StepFailed(f"{gguf} holds no chat template", "make the merged model and the GGUF file again")
    with tempfile.TemporaryDirectory(prefix="finetune-templates-") as temporary:
        bare = Path(temporary) / "bare.gguf"
        write_bare(head, bare)
        with closing(ProbeEngine(bare, num_ctx=CONTEXT, letter=0, pure=False)) as engine:
            return prove(
                engine,
                template,
                special_tokens(head),
                add_bos=adds_bos(head),
                architecture=str(head.get("general.architecture")),
                system=system,
            )


def differences(engine: ProbeEngine, template: str, specials: Mapping[str, str], *, add_bos: bool) -> dict[str, str]:
    """Return the first difference between llama.cpp's prompts and training's, by kind of conversation.

    What the chat template refuses in training is not compared: there is nothing to be the same as.
    """
    from jinja2 import TemplateError

    # A server tells models that can think to do so, unless a request says otherwise.
    thinks = {"chat_template_kwargs": {"enable_thinking": True}} if "thinking" in jinja_capabilities(template) else {}
    bos = specials.get("bos_token", "") if add_bos else ""
    found: dict[str, str] = {}
    talks: Iterator[tuple[str, Talk, list[dict[str, Any]] | None]] = (
        (kind, [dict(message) for message in talk], None) for kind, talk in battery()
    )
    for kind, talk, tools in (*talks, *_with_tools(template, specials)):
        try:
            wanted = render_jinja(template, talk, specials, tools=tools)
        except TemplateError:
            continue
        try:
            request = {"messages": _as_sent(talk), **thinks} | ({"tools": tools} if tools else {})
            difference = differs(bos + engine.prompt(request), wanted)
        except StepFailed as refused:
            difference = f"it refuses it: {refused.message}"
        if difference is not None:
            found.setdefault(kind, difference)
    return found


def _with_tools(template: str, specials: Mapping[str, str]) -> Iterator[tuple[str, Talk, list[dict[str, Any]]]]:
    """Yield conversations with tools; none where the template does not write them."""
    from jinja2 import TemplateError

    # In the order in which an Ollama server hands the keys on: required before properties.
    parameters = {
        "type": "object",
        "required": ["city"],
        "properties": {
            "city": {"type": "string", "description": "a city, <b>by name</b> & 'quoted'"},
            "days": {"type": "integer", "description": "天数"},
        },
    }
    name = "qxWeatherxq"
    tools = [{"type": "function", "function": {"name": name, "description": "the weather", "parameters": parameters}}]
    question = {"role": "user", "content": "How warm is it in Paris?"}
    opening = {"role": "system", "content": "You are a helpful assistant."}
    call = {"name": name, "arguments": {"city": "Paris <1>", "days": 2}}
    called = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call12345", "type": "function", "function": call}],
    }
    result = {"role": "tool", "content": '{"warm": 21}', "tool_call_id": "call12345", "name": name}
    try:
        if name not in render_jinja(template, [question], specials, tools=tools):
            return
    except TemplateError:
        return
    for start in ([], [opening]):
        yield TOOLS, [*start, question], tools
        yield CALLS, [*start, question, called, result], tools
        yield CALLS, [*start, question, called, result, {"role": "assistant", "content": "21."}, question], tools


def _as_sent(talk: Talk) -> Talk:
    """Return messages as an Ollama server sends them to llama.cpp: arguments of calls are JSON text."""

    def sent(call: Mapping[str, Any]) -> dict[str, Any]:
        arguments = json.dumps(call["function"]["arguments"], separators=(",", ":"), ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": arguments}}

    return [
        message | ({"tool_calls": [sent(call) for call in message["tool_calls"]]} if "tool_calls" in message else {})
        for message in talk
    ]
