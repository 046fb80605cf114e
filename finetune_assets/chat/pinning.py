"""Chat templates that ask the engine what day it is, or whether to think, made to get the same answer everywhere.

transformers, llama.cpp and Ollama each answer in their own way: llama.cpp says `enable_thinking` and today's date where
transformers says nothing. A model would be trained with one prompt and served with another. So the answer that training
gives is written in front of the template, before training, and goes with the model wherever it is served.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date
from typing import Any

from finetune_assets.chat.template_limits import rendering

DAY = date(2024, 7, 26)  # the one that Llama 3's own templates fall back to
# What llama.cpp tells a template and transformers does not. Two values of each, to see whether it matters.
DATES = {"date_string": "%d %b %Y", "datetime": "%b %d %Y"}
OTHER_DAY = date(2031, 1, 9)
THINKING = "enable_thinking"
NOTHING = "not_set_in_training"  # a name that nobody defines
CLOCK = "strftime_now"
CLOCK_CALLS = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
PREFIX = re.compile(r"(?:\{% (?:set|macro) (?P<name>date_string|datetime|enable_thinking|strftime_now)\b)")
Conversation = list[dict[str, str]]


def pinned(template: str) -> str:
    """The chat template with training's date and thinking written in front; the same text if it asks for neither.

    Whoever renders it, with whatever they know, gets what transformers makes of `template` on `DAY`.
    """
    prefix = ""
    for name, form in DATES.items():
        if name in template and _matters(prefix + template, **{name: OTHER_DAY.strftime(form)}):
            prefix += f'{{% set {name} = "{DAY.strftime(form)}" %}}'
    here, there = (prefix + _clock(template, day) + template for day in (DAY, OTHER_DAY))
    if here != there and _differ(here, there):
        prefix = here.removesuffix(template)
    if THINKING in template and any(_matters(prefix + template, enable_thinking=value) for value in (True, False)):
        value = NOTHING if _matters(prefix + template, enable_thinking=False) else "false"
        if _matters(prefix + template, enable_thinking=True):
            prefix += f"{{% set {THINKING} = {value} %}}"
    return prefix + template


def pins(template: str) -> list[str]:
    """What `pinned` wrote in front of this template, in words."""
    found, at = set(), 0
    while begin := PREFIX.match(template, at):
        found.add(begin["name"])
        closing = "{% endmacro %}" if begin["name"] == CLOCK else "%}"
        at = template.index(closing, at) + len(closing)
    words = {
        "thinking is off, as it was in training, whatever a request says": THINKING in found,
        f"the date in the prompt is {DAY.day} {DAY:%B %Y}, as it was in training": bool(found - {THINKING}),
    }
    return [text for text, told in words.items() if told]


def _clock(template: str, day: date) -> str:
    """A macro in the place of transformers' clock; nothing where the template asks it in a way that is not plain."""
    forms = sorted({found[2] for found in CLOCK_CALLS.finditer(template)})
    if not forms or template.count(f"{CLOCK}(") != len(CLOCK_CALLS.findall(template)):
        return ""
    answers = "".join(f"{{% if form == '{form}' %}}{day.strftime(form)}{{% endif %}}" for form in forms)
    return f"{{% macro {CLOCK}(form) %}}{answers}{{% endmacro %}}"


def _matters(template: str, **told: Any) -> bool:
    """Whether conversations are rendered differently when the template is told this."""
    return _differ(template, template, told)


def _differ(first: str, second: str, told: dict[str, Any] | None = None) -> bool:
    """Whether two templates render conversations differently; `told` is what the second one is told."""
    return any(
        _rendered(first, talk, prompt, {}) != _rendered(second, talk, prompt, told or {})
        for talk in _conversations()
        for prompt in (True, False)
    )


def _conversations() -> Iterator[Conversation]:
    system, user, answer = ({"role": role, "content": f"a {role}'s words"} for role in ("system", "user", "assistant"))
    for opening in ([], [system]):
        yield [*opening, user]
        yield [*opening, user, answer, user]


def _rendered(template: str, talk: Conversation, prompt: bool, told: dict[str, Any]) -> str:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    given: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "", "pad_token": ""} | told
    try:
        with rendering():
            rendered = render_jinja_template([talk], chat_template=template, add_generation_prompt=prompt, **given)
    except (TemplateError, TypeError) as error:  # a template that refuses this conversation refuses it in training, too
        return f"refused: {error}"
    return str(rendered[0][0])
