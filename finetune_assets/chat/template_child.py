"""The program that renders conversations by a chat template within limits of time and memory. It is never imported.

A chat template is a program by the model's publisher. Jinja's sandbox keeps it from files and the network, but not
from endless loops or from texts that fill the memory. Started as `python -I template_child.py` it reads
{"template", "conversations", "specials", "seconds", "bytes"} as JSON and prints {"error": null or "memory"}. The caller
ends it if it does not answer. It loads jinja2 only: the memory limit leaves no room for torch.
"""

import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import ClassVar

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "to look up",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}


class Generation(jinja2.ext.Extension):
    """transformers' `{% generation %}` marks the model's answers; here it only has to parse."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        """Replace the block by its content."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: str) -> None:
    """Raise the error of a template that refuses a conversation."""
    raise jinja2.TemplateError(message)


def now(form: str) -> str:
    """Return the date in the form that a template names."""
    return datetime.now().astimezone().strftime(form)


@contextmanager
def harmless() -> Iterator[None]:
    """Ignore refusals and errors of a template: the code that needs the conversation reports them."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as refused:
        refused.__traceback__ = None


def render(template: str, conversations: list[list[dict[str, str]]], specials: dict[str, str]) -> None:
    """Render each conversation with and without the answer's header, and with a tool."""
    extensions: list[type[jinja2.ext.Extension]] = [Generation, jinja2.ext.loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals |= {"raise_exception": refuse, "strftime_now": now}
    compiled = None
    with harmless():
        compiled = environment.from_string(template)
    if compiled is None:
        return
    for messages in conversations:
        for options in ({"add_generation_prompt": True}, {"add_generation_prompt": False}, {"tools": [TOOL]}):
            with harmless():
                compiled.render(messages=messages, **{**specials, "tools": None, **options})


def main() -> None:
    """Read the job, render it within its limits, and print the result."""
    job = json.load(sys.stdin)
    limits = {resource.RLIMIT_AS: job["bytes"], resource.RLIMIT_CPU: job["seconds"], resource.RLIMIT_CORE: 0}
    for limit, value in limits.items():
        with suppress(ValueError, OSError):  # macOS does not support a limit on the address space
            resource.setrlimit(limit, (value, value))
    error = None
    try:
        render(job["template"], job["conversations"], job["specials"])
    except MemoryError:
        error = "memory"
    json.dump({"error": error}, sys.stdout)


if __name__ == "__main__":
    main()
