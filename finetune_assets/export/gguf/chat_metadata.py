"""Metadata of a GGUF file that make every server treat conversations as training did.

The converter describes the tokenizer, but the chat template decides how it is used. Without a correction, a server puts
a begin-of-text token before a prompt whose template has none, or does not stop at the template's end of turn.
"""

from __future__ import annotations

from finetune_assets.chat.rendering import render_jinja
from finetune_assets.models.formats.gguf import BOOL, UINT32, Head

ADD_BOS = "tokenizer.ggml.add_bos_token"
END_OF_TURN = "tokenizer.ggml.eot_token_id"


def corrected(head: Head, stop_token_ids: list[int]) -> Head:
    """Return the head with the chat template's begin-of-text and end-of-turn; the same head if both are right."""
    template = head.get("tokenizer.chat_template")
    if template and head.get("tokenizer.ggml.bos_token_id") is not None:
        adds = head.get(ADD_BOS)
        # Not stated: the tokenizer adds none, but the defaults of servers differ.
        if adds is None or (adds and not _begins_with_bos(template, special_tokens(head))):
            head = head.with_value(ADD_BOS, BOOL, False)
    other = [token for token in stop_token_ids if token != head.get("tokenizer.ggml.eos_token_id")]
    if other and head.get(END_OF_TURN) not in stop_token_ids:
        head = head.with_value(END_OF_TURN, UINT32, other[0])
    return head


def special_tokens(head: Head) -> dict[str, str]:
    """Return the texts that a chat template may ask for: bos_token, eos_token, unk_token, pad_token."""
    tokens = head.get("tokenizer.ggml.tokens", [])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: head.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {name: tokens[number] for name, number in ids.items() if number is not None and number < len(tokens)}


def adds_bos(head: Head) -> bool:
    """Return whether a server puts the begin-of-text token before every prompt itself."""
    return head.get("tokenizer.ggml.bos_token_id") is not None and head.get(ADD_BOS, True)


def _begins_with_bos(template: str, specials: dict[str, str]) -> bool:
    from jinja2 import TemplateError

    try:
        return render_jinja(template, [{"role": "user", "content": "x"}], specials).startswith(specials["bos_token"])
    except TemplateError:  # a template that refuses plain conversations: keep the tokenizer's value
        return True
