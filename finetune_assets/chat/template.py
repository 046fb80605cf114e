"""Conversion of messages to token ids, the same for training, evaluation and export.

The caller sets the tokenizer's `chat_template` to the resolved template; after that the ids of a row are exactly
those of the tokenizer's own `apply_chat_template`.

Which tokens are learnt: each assistant turn from its first token after the turn's header to the token that ends the
turn, that one included. What a template writes after it (a line break, say) is never generated, so it is not learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_assets.chat.named_templates import TEMPLATES
from finetune_assets.chat.template_limits import rendering
from finetune_assets.recipe import did_you_mean
from finetune_assets.reporting.errors import BadInput
from finetune_assets.reporting.first_difference import first_difference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that PyTorch's cross entropy ignores


@dataclass(frozen=True)
class Encoded:
    """One conversation as token ids.

    Attributes:
        input_ids: at most `cutoff_len` ids.
        labels: as many as input_ids; the id where it is learnt, -100 elsewhere.
        cut: the row was longer than `cutoff_len` and lost its end.
    """

    input_ids: list[int]
    labels: list[int]
    cut: bool

    @property
    def learnt(self) -> int:
        """Count the tokens that are learnt; 0 means that there is nothing to learn from the row.

        The first position does not count: no earlier token predicts it.
        """
        return sum(label != IGNORED for label in self.labels[1:])


def resolve_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the Jinja text that the recipe's `model.template` names.

    Args:
        name: auto (the tokenizer's own), or one of `TEMPLATES`.

    Raises:
        BadInput: the name is unknown, or the tokenizer lacks a template (auto) or the template's tokens.
    """
    if name == "auto":
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        if not own:
            raise BadInput(
                "model.template is auto, but the base model's tokenizer has no chat template",
                f"name one: {', '.join(TEMPLATES)}",
            )
        return own
    if name not in TEMPLATES:
        raise BadInput(f"model.template: unknown template {name!r}{did_you_mean(name, ['auto', *TEMPLATES])}")
    text, tokens = TEMPLATES[name]
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in tokens if token not in vocabulary]:
        raise BadInput(
            f"model.template: {name} needs the tokens {', '.join(missing)}, which the base model does not have",
            "use auto, or a template whose tokens the base model has",
        )
    return text


def with_system(messages: Sequence[Mapping[str, str]], default_system: str | None) -> list[dict[str, str]]:
    """Return the messages, with `default_system` in front if they bring no system message (none when empty)."""
    own = [dict(message) for message in messages]
    if default_system and not (own and own[0]["role"] == "system"):
        return [{"role": "system", "content": default_system}, *own]
    return own


def stop_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Return the ids at which generation ends: the template's end-of-turn token, then the eos token if different.

    Raises:
        BadInput: the template ends an assistant turn without a special token, so that a model trained with it
            would never learn to stop.
    """
    probe = "Zebra"
    turns = [{"role": "user", "content": "Horse"}, {"role": "assistant", "content": probe}]
    text = _render(tokenizer, turns, template=template)
    tail = text[text.rfind(probe) + len(probe) :] if probe in text else ""
    special = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    ends = [index for index in _ids(tokenizer, tail) if index in special][:1]
    if not ends:
        raise BadInput(
            f"the chat template ends an assistant turn with {tail!r}, which holds no special token: "
            "a model trained with it would not learn to stop",
            f"name a different template under model.template: {', '.join(TEMPLATES)}",
        )
    eos = tokenizer.eos_token_id
    return list(dict.fromkeys([*ends, *([eos] if isinstance(eos, int) else [])]))


def chat_settings(tokenizer: PreTrainedTokenizerBase, default_system: str | None) -> dict[str, Any]:
    """Return the content of chat.json beside an adapter or merged model: all that a server needs for chat."""
    template = resolve_template("auto", tokenizer)
    stops = stop_tokens(tokenizer, template)
    return {
        "template": template,
        "default_system": default_system or None,
        "stop_token_ids": stops,
        "stop": [str(tokenizer.convert_ids_to_tokens(index)) for index in stops],
    }


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, default_system: str | None = None
) -> list[int]:
    """Return the prompt's ids for `messages`, which end with a user turn; the answer's header is included."""
    return _ids(tokenizer, _render(tokenizer, with_system(messages, default_system), prompt=True))


def encode_row(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    *,
    default_system: str | None = None,
    cutoff_len: int = 2048,
    train_on_prompt: bool = False,
    mask_history: bool = False,
) -> Encoded:
    """Encode a conversation as ids and labels. The ids are those of the whole rendered conversation.

    A row longer than `cutoff_len` loses its end. What remains of a cut answer is learnt as it is: no end-of-turn
    token is put where the answer does not end.

    Args:
        messages: roles system (first only), user, assistant; the last one is the assistant's.
        cutoff_len: most tokens to keep.
        train_on_prompt: learn every token, not only the answers'.
        mask_history: learn the last answer only.

    Raises:
        BadInput: the template refuses the conversation, or renders its beginning differently once more turns
            follow, so that the answers cannot be located.
    """
    if train_on_prompt and mask_history:
        raise BadInput("train.train_on_prompt and train.mask_history exclude each other", "set one of them")
    turns = with_system(messages, default_system)
    text = _render(tokenizer, turns)
    input_ids = _ids(tokenizer, text)
    cut = len(input_ids) > cutoff_len
    if train_on_prompt:
        return Encoded(input_ids[:cutoff_len], input_ids[:cutoff_len], cut)
    labels = [IGNORED] * len(input_ids)
    stops = set(stop_tokens(tokenizer, resolve_template("auto", tokenizer)))
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    for index in answers[-1:] if mask_history else answers:
        start = _boundary(tokenizer, turns, index, text, input_ids, prompt=True)
        end = _boundary(tokenizer, turns, index + 1, text, input_ids)
        # The last stop token: an answer may itself contain the text of one.
        end = next((at + 1 for at in range(end - 1, start - 1, -1) if input_ids[at] in stops), end)
        labels[start:end] = input_ids[start:end]
    return Encoded(input_ids[:cutoff_len], labels[:cutoff_len], cut)


def _boundary(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[dict[str, str]],
    count: int,
    text: str,
    input_ids: list[int],
    *,
    prompt: bool = False,
) -> int:
    """Count the `input_ids` of the first `count` turns (with the next answer's header if `prompt`).

    Where a token spans the boundary (a header's last line break and an answer's first, say), it counts as the later
    part's: the ids stay those of the whole text.
    """
    if count == len(turns) and not prompt:
        return len(input_ids)
    head = _render(tokenizer, turns[:count], prompt=prompt)
    if not text.startswith(head):
        same = first_difference(head, text)
        raise BadInput(
            "the chat template renders the beginning of a conversation differently once more turns follow "
            f"(turn {count}: {head[same : same + 40]!r} becomes {text[same : same + 40]!r}), "
            "so the answers of earlier turns cannot be learnt with it",
            "set train.mask_history: true (only the last answer is learnt), or name a different template under "
            f"model.template: {', '.join(TEMPLATES)}",
        )
    return first_difference(_ids(tokenizer, head), input_ids)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Mapping[str, str]],
    *,
    prompt: bool = False,
    template: str | None = None,
) -> str:
    """Render a conversation by the template.

    Raises:
        BadInput: the template is not valid Jinja, or refuses the conversation (some do not support the system role).
    """
    try:
        with rendering():
            rendered = tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], chat_template=template, add_generation_prompt=prompt, tokenize=False
            )
    except BadInput:
        raise
    except Exception as error:  # a template is a program, which can fail in every way (division by zero, say)
        roles = ", ".join(turn["role"] for turn in turns)
        raise BadInput(
            f"the chat template refuses a conversation with the roles {roles}: {error}",
            "remove the role that it does not support (model.default_system adds a system turn), or name a different "
            f"template under model.template: {', '.join(TEMPLATES)}",
        ) from error
    return str(rendered)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of rendered text, which already contains the special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
