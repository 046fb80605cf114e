"""Greedy decoding: one loop for both evaluation and chat.

With greedy decoding a prompt always gives the same answer, so the answers of two models can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


# The next token of each unfinished row: (row, token).
Step = list[tuple[int, int]]


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the rows as one left-padded batch: input_ids, attention_mask and position_ids, each (rows, longest).

    Any id serves as padding, because the mask excludes it.
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
    """Decode all prompts at once, one token of each unfinished row per step.

    A row ends with a stop token (the last that it yields) or after `max_new_tokens`. It then leaves the batch, which
    makes the remaining steps faster.

    Args:
        prompts: token ids, none of them empty.

    Yields:
        (row, token) of each unfinished row; row counts from 0 in the order of `prompts`.
    """
    import torch

    device = model.device
    stops = set(stop_token_ids)
    batch = left_padded(prompts, device)
    rows = list(range(len(prompts)))
    cache = None
    for _ in range(max_new_tokens):
        # Not around the yield: the mode would also apply to the caller's code.
        with torch.inference_mode():
            output = model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens = output.logits[:, -1].argmax(-1)
        cache = output.past_key_values
        answered = tokens.tolist()
        yield list(zip(rows, answered, strict=True))
        keep = [index for index, token in enumerate(answered) if token not in stops]
        if not keep:
            return
        with torch.inference_mode():
            if len(keep) < len(rows):
                rows = [rows[index] for index in keep]
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
