"""Greedy answers to many prompts, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_assets.models.decoding import greedy_steps
from finetune_assets.models.loading import Chat


@dataclass(frozen=True)
class Answer:
    """Answer of a model.

    Attributes:
        text: without special tokens and surrounding spaces.
        tokens: generated tokens, the stop token included.
        ended: whether the model ended it with a stop token, rather than reaching `max_new_tokens`.
    """

    text: str
    tokens: int
    ended: bool


def generate(
    model: Any,
    chat: Chat,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    done: Callable[[int], None] = lambda rows: None,
) -> list[Answer]:
    """Return the model's answers, in the order of the prompts.

    Prompts of similar length share a batch, so that little is padded. The longest come first: a batch that is too large
    for the accelerator's memory shows at once. It is then halved, and so are all later batches.

    Args:
        prompts: token ids as `encode_prompt` gives them.
        done: is called after each batch with the number of rows answered.
    """
    import torch

    answers: dict[int, Answer] = {}
    waiting = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    while waiting:
        rows = waiting[:batch_size]
        try:
            tokens = _answer([prompts[row] for row in rows], model, chat, max_new_tokens)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
            batch_size = len(rows) // 2
            torch.cuda.empty_cache()
            continue
        stops = set(chat.stop_token_ids)
        for row, ids in zip(rows, tokens, strict=True):
            ended = bool(ids) and ids[-1] in stops
            text = chat.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
            answers[row] = Answer(str(text).strip(), len(ids), ended)
        waiting = waiting[len(rows) :]
        done(len(rows))
    return [answers[row] for row in range(len(prompts))]


def _answer(prompts: list[Sequence[int]], model: Any, chat: Chat, max_new_tokens: int) -> list[list[int]]:
    """Return the token ids of the answers to one batch of prompts."""
    tokens: list[list[int]] = [[] for _ in prompts]
    for step in greedy_steps(model, prompts, chat.stop_token_ids, max_new_tokens):
        for row, token in step:
            tokens[row].append(token)
    return tokens
