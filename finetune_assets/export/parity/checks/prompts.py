"""Prompts as llama.cpp reads them, against the token ids that training reads."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_assets.export.parity.checks.failure import Failure
from finetune_assets.reporting.first_difference import first_difference


def check_prompt(ours: Sequence[int], theirs: Sequence[int], read: int | None, bos: int | None) -> list[Failure]:
    """Compare the begin-of-text tokens of a prompt, then all of its ids.

    Args:
        ours: the Hugging Face tokenizer's, of the prompt that training's template renders.
        theirs: llama.cpp's, of the prompt that the file's template renders.
        read: how many tokens a chat completion of the same messages read, where that was tried.
    """
    failures: list[Failure] = []
    if bos is not None and (found := _leading(theirs, bos)) != (wanted := _leading(ours, bos)):
        failures.append(Failure("begin of text", f"{found} begin-of-text tokens before a prompt", str(wanted)))
    if list(ours) != list(theirs):
        at = first_difference(ours, theirs)
        found = f"{len(theirs)} ids of a prompt, from position {at} on {list(theirs[at : at + 4])}"
        failures.append(Failure("prompt ids", found, f"{len(ours)} ids, {list(ours[at : at + 4])} there"))
    elif read is not None and read != len(ours):
        failures.append(Failure("prompt ids", f"{read} tokens read by a chat completion", str(len(ours))))
    return failures


def _leading(ids: Sequence[int], token: int) -> int:
    return next((at for at, found in enumerate(ids) if found != token), len(ids))
