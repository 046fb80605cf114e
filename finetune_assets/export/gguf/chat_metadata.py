"""What a GGUF file has to say about conversations so that every server treats them as training did.

The converter describes the tokenizer; how it is used is decided by the chat template. Left alone, a server puts a
begin-of-text token before a prompt whose template has none, or does not stop at the template's end of turn.
"""

from __future__ import annotations

from finetune_assets.chat.rendering import render_jinja
from finetune_assets.export.ollama.template.derive import special_tokens
from finetune_assets.models.formats.gguf import BOOL, UINT32, Head

ADD_BOS = "tokenizer.ggml.add_bos_token"
END_OF_TURN = "tokenizer.ggml.eot_token_id"


def corrected(head: Head, stop_token_ids: list[int]) -> Head:
    """The head with begin-of-text and end-of-turn as the chat template has them; the same one if nothing is amiss."""
    template = head.get("tokenizer.chat_template")
    if template and head.get("tokenizer.ggml.bos_token_id") is not None:
        adds = head.get(ADD_BOS)
        # Not said: the tokenizer adds none, yet servers differ in what they take for granted.
        if adds is None or (adds and not _begins_with_bos(template, special_tokens(head))):
            head = head.with_value(ADD_BOS, BOOL, False)
    other = [token for token in stop_token_ids if token != head.get("tokenizer.ggml.eos_token_id")]
    if other and head.get(END_OF_TURN) not in stop_token_ids:
        head = head.with_value(END_OF_TURN, UINT32, other[0])
    return head


def _begins_with_bos(template: str, specials: dict[str, str]) -> bool:
    from jinja2 import TemplateError

    try:
        return render_jinja(template, [{"role": "user", "content": "x"}], specials).startswith(specials["bos_token"])
    except TemplateError:  # no template for plain conversations: leave the tokenizer's word
        return True
