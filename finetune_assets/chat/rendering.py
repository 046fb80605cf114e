"""Prompts as transformers renders them from a chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune_assets.chat.template_limits import rendering
from finetune_assets.reporting.errors import BadInput


def render_jinja(
    template: str,
    messages: Sequence[Mapping[str, str]],
    specials: Mapping[str, str],
    *,
    generation: bool = True,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """Return the prompt as transformers renders it, in its sandbox. Raises jinja2.TemplateError if that fails."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = [dict(message) for message in messages]
    # Llama 3's templates use today's date unless a date is set.
    given: dict[str, Any] = {**specials, "date_string": "26 Jul 2024", "tools": tools}
    try:
        with rendering():
            rendered = render_jinja_template(
                [conversation], chat_template=template, add_generation_prompt=generation, **given
            )
    except (TemplateError, BadInput):
        raise
    except Exception as error:  # raised by the template: it expects a different form of message, say
        raise TemplateError(str(error)) from error
    return rendered[0][0]
