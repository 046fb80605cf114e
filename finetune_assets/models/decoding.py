"""The greedy answers of a model: the one loop behind scores and chat.

Greedy only: the same prompt gives the same answer, so that two models can be compared by theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


# A row whose answer is complete, and the row's next token otherwise: (row, token).
Step = list[tuple[int, int]]


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """The rows as one batch that ends flush: input_ids, attention_mask and position_ids, each (rows, longest).

    Any id serves as padding, as nothing attends to it.
    """
    import torch

    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def greedy_steps(
    model: Any, prompts: Sequence[Sequence[int]], stop_token_ids: Sequence[int], max_new_tokens: int
) -> Iterator[Step]:
    """Answers to all prompts at once, one token of each unfinished row per step.

    A row ends with a stop token (the last that it yields) or after `max_new_tokens`; it then leaves the batch, so that
    the rest gets quicker.

    Args:
        prompts: token ids, none of them empty.

    Yields:
        (row, token) of each row that is still being answered; row counts from 0 in the order of `prompts`.
    """
    import torch

    device = model.device
    stops = set(stop_token_ids)
    batch = left_padded(prompts, device)
    rows = list(range(len(prompts)))
    cache = None
    for _ in range(max_new_tokens):
        # Not around the yield: the mode would reach into the caller's code.
        with torch.inference_mode():
            output = model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens = output.logits[:, -1].argmax(-1)
        cache = output.past_key_values
        answered = tokens.tolist()
        yield list(zip(rows, answered, strict=True))
        keep = [place for place, token in enumerate(answered) if token not in stops]
        if not keep:
            return
        with torch.inference_mode():
            if len(keep) < len(rows):
                rows = [rows[place] for place in keep]
                kept = torch.tensor(keep, device=device)
                cache.reorder_cache(kept)
                tokens = tokens[kept]
                batch = {name: tensor[kept] for name, tensor in batch.items()}
            mask = batch["attention_mask"]
            batch = {
                "input_ids": tokens[:, None],
                "attention_mask": torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1),
                "position_ids": batch["position_ids"][:, -1:] + 1,
            }
