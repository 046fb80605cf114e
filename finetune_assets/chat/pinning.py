"""Chat templates with a fixed date and thinking mode, so that every engine renders the same prompt.

transformers, llama.cpp and Ollama set a template's variables differently: llama.cpp sets `enable_thinking` and today's
date, and transformers does not. A model would be trained with one prompt and served with a different one. So the values
of training are written in front of the template before training, and stay with the model wherever it is served.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date
from typing import Any

from finetune_assets.chat.template_limits import rendering

DAY = date(2024, 7, 26)  # the default of Llama 3's own templates
# Variables that llama.cpp sets and transformers does not. Two dates show whether a template uses them.
DATES = {"date_string": "%d %b %Y", "datetime": "%b %d %Y"}
OTHER_DAY = date(2031, 1, 9)
THINKING = "enable_thinking"
NOTHING = "not_set_in_training"  # a name that is never defined
CLOCK = "strftime_now"
CLOCK_CALLS = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
PREFIX = re.compile(r"(?:\{% (?:set|macro) (?P<name>date_string|datetime|enable_thinking|strftime_now)\b)")
Conversation = list[dict[str, str]]


def pinned(template: str) -> str:
    """Return the chat template with the date and thinking mode of training in front; unchanged if it uses neither.

    Every engine, whatever variables it sets, then renders what transformers renders from `template` on `DAY`.
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
    """Describe what `pinned` wrote in front of this template."""
    names, at = set(), 0
    while begin := PREFIX.match(template, at):
        names.add(begin["name"])
        closing = "{% endmacro %}" if begin["name"] == CLOCK else "%}"
        at = template.index(closing, at) + len(closing)
    words = {
        "thinking is off, as it was in training, whatever a request says": THINKING in names,
        f"the date in the prompt is {DAY.day} {DAY:%B %Y}, as it was in training": bool(names - {THINKING}),
    }
    return [text for text, applies in words.items() if applies]


def _clock(template: str, day: date) -> str:
    """Return a macro that replaces transformers' clock; empty if the template calls it with more than a plain text."""
    forms = sorted({call[2] for call in CLOCK_CALLS.finditer(template)})
    if not forms or template.count(f"{CLOCK}(") != len(CLOCK_CALLS.findall(template)):
        return ""
    answers = "".join(f"{{% if form == '{form}' %}}{day.strftime(form)}{{% endif %}}" for form in forms)
    return f"{{% macro {CLOCK}(form) %}}{answers}{{% endmacro %}}"


def _matters(template: str, **variables: Any) -> bool:
    """Return whether these variables change how conversations are rendered."""
    return _differ(template, template, variables)


def _differ(first: str, second: str, variables: dict[str, Any] | None = None) -> bool:
    """Return whether two templates render conversations differently; only the second gets `variables`."""
    return any(
        _rendered(first, talk, prompt, {}) != _rendered(second, talk, prompt, variables or {})
        for talk in _conversations()
        for prompt in (True, False)
    )


def _conversations() -> Iterator[Conversation]:
    system, user, answer = ({"role": role, "content": f"a {role}'s words"} for role in ("system", "user", "assistant"))
    for opening in ([], [system]):
        yield [*opening, user]
        yield [*opening, user, answer, user]


def _rendered(template: str, talk: Conversation, prompt: bool, variables: dict[str, Any]) -> str:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    given: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "", "pad_token": ""} | variables
    try:
        with rendering():
            rendered = render_jinja_template([talk], chat_template=template, add_generation_prompt=prompt, **given)
    except (TemplateError, TypeError) as error:  # a template that refuses this conversation refuses it in training, too
        return f"refused: {error}"
    return str(rendered[0][0])
