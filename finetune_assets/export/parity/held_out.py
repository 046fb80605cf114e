"""Held-out conversations on which two forms of a model are compared, and the logits of a model in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.chat.template import IGNORED, encode_prompt, encode_row, with_system
from finetune_assets.data.rows import read_split
from finetune_assets.models.loading import Chat
from finetune_assets.reporting.errors import StepFailed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


CONVERSATIONS = 8
POINTS = 64  # positions compared, over all conversations
LONGEST = 512  # tokens of a conversation that are read

# For recipes without held-out rows: any text serves to compare two models.
BUILT_IN = (
    ("What is the capital of France?", "The capital of France is Paris, a city on the river Seine."),
    ("Who are you?", "I am a helpful assistant. I answer questions and explain how things work."),
    ("请用一句话介绍你自己。", "我是一个乐于助人的助手，可以回答问题。"),
)


@dataclass(frozen=True)
class Point:
    """A position in a conversation: all ids before it, and the id at it."""

    prefix: tuple[int, ...]
    label: int


@dataclass(frozen=True)
class Conversation:
    """A held-out row.

    Attributes:
        prompt: all turns but the last answer, and their ids with the answer's header.
        ids: of the whole, or of its beginning.
        places: positions in `ids` that are points.
    """

    prompt: tuple[list[dict[str, str]], list[int]]
    ids: list[int]
    places: list[int]

    @property
    def points(self) -> list[Point]:
        return [Point(tuple(self.ids[:at]), self.ids[at]) for at in self.places]


def choose(
    held_out: Path, chat: Chat, *, conversations: int = CONVERSATIONS, points: int = POINTS, longest: int = LONGEST
) -> list[Conversation]:
    """Return conversations of a test.jsonl; if it has none with an answer, a few built-in ones.

    Args:
        conversations: at most so many.
        points: at most so many positions over all of them.
        longest: tokens of a conversation that are read.

    Raises:
        StepFailed: the chat template leaves no words of an answer.
    """
    sizes = (conversations, points, longest)
    chosen = pick(read_split(held_out), chat, *sizes) or pick(_built_in(), chat, *sizes)
    if not chosen:
        raise StepFailed("the chat template leaves no words of an answer to compare models by")
    return chosen


def pick(
    rows: Sequence[Mapping[str, Any]], chat: Chat, conversations: int, points: int, longest: int
) -> list[Conversation]:
    """Return the first `conversations` rows by id, with `points` positions over all their last answers."""
    encoded = []
    for row in sorted(rows, key=lambda row: row["id"]):
        turns = with_system(row["messages"], chat.default_system)
        ids, labels = _encoded(chat.tokenizer, turns, longest)
        if places := [at for at in range(1, len(ids)) if labels[at] != IGNORED]:
            encoded.append((turns[:-1], ids, places))
        if len(encoded) == conversations:
            break
    counts = shares([len(places) for _, _, places in encoded], points)
    chosen: list[Conversation] = []
    for (turns, ids, places), count in zip(encoded, counts, strict=True):
        at = [places[number * len(places) // count] for number in range(count)]
        chosen.append(Conversation((turns, encode_prompt(chat.tokenizer, turns)), ids, at))
    return chosen


def shares(sizes: Sequence[int], total: int) -> list[int]:
    """Return the shares of `total` that go to members of these sizes: equal, as far as each member is large enough."""
    given = [0] * len(sizes)
    left = total
    for waiting, number in zip(range(len(sizes), 0, -1), sorted(range(len(sizes)), key=sizes.__getitem__), strict=True):
        given[number] = min(sizes[number], left // waiting)
        left -= given[number]
    return given


def logits(model: Any, chosen: Sequence[Conversation]) -> list[torch.Tensor]:
    """Return the model's logits at the points of each conversation: float32 on the CPU, (points, vocabulary)."""
    import torch

    found: list[torch.Tensor] = []
    for conversation in chosen:
        last = conversation.places[-1]
        ids = torch.tensor([conversation.ids[:last]], device=model.device)
        keep = torch.tensor([at - 1 for at in conversation.places], device=model.device)
        with torch.inference_mode():
            found.append(model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0].float().cpu())
    return found


def _encoded(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], longest: int
) -> tuple[list[int], list[int]]:
    """Return ids and labels. Only the last answer has labels: with every template it can have them."""
    encoded = encode_row(tokenizer, turns, cutoff_len=longest, mask_history=True)
    return encoded.input_ids, encoded.labels


def _built_in() -> list[dict[str, Any]]:
    return [
        {
            "id": str(number),
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}],
        }
        for number, (asked, answer) in enumerate(BUILT_IN)
    ]
