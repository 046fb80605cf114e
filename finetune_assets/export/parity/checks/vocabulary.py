"""The tokens of a GGUF file against the tokenizer's, including those that no held-out row uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_assets.export.parity.checks.architecture import PLAIN, architecture
from finetune_assets.export.parity.checks.failure import Failure
from finetune_assets.export.parity.checks.structure import ORDINARY
from finetune_assets.inputs.json_text import read_model_json
from finetune_assets.models.formats.gguf import Head
from finetune_assets.reporting.first_difference import first_difference

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

CHECK = "vocabulary"
PARSED = (2, 3, 4)  # kinds (unknown, control, user-defined) that are found in a text before it is cut up


def check_vocabulary(
    head: Head, merged: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Failure]:
    """Compare number, text and kind of tokens, and the merges, as far as the converter leaves them unchanged.

    Args:
        merged: Hugging Face folder.
        config: of the merged model, or of the part of it that reads text.
        tokenizer: its tokenizer.
    """
    tokens: list[str] = head.get("tokenizer.ggml.tokens", [])
    kinds: list[int] = head.get("tokenizer.ggml.token_type", [])
    plain = architecture(head) in PLAIN
    found = [*_sizes(head, len(tokens), getattr(config, "vocab_size", None) if plain else None)]
    found += _added(tokens, kinds, tokenizer)
    if plain and head.get("tokenizer.ggml.model") == "gpt2":  # the pieces of other kinds are rewritten
        found += [*_ordinary(tokens, kinds, tokenizer), *_merges(head, merged)]
    return found


def _sizes(head: Head, tokens: int, wanted: int | None) -> Iterator[Failure]:
    rows = next((tensor.shape[-1] for tensor in head.tensors if tensor.name == "token_embd.weight"), None)
    if rows is not None and tokens != rows:
        yield Failure(CHECK, f"{tokens} tokens", f"{rows}, one for each row of the embeddings")
    if wanted not in (None, tokens):
        yield Failure(CHECK, f"{tokens} tokens", f"{wanted}, as vocab_size says")


def _added(tokens: list[str], kinds: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[Failure]:
    """Yield the first special token that differs or is an ordinary one; tokens without a row are left out."""
    for number, added in sorted(tokenizer.added_tokens_decoder.items()):
        if not added.special or added.normalized or number >= len(tokens):
            continue
        if tokens[number] != added.content:
            found = f"token {number} is {tokens[number]!r}"
            yield Failure(CHECK, found, f"{added.content!r}, a token of the tokenizer's")
            return
        if number < len(kinds) and kinds[number] not in PARSED:
            found = f"{added.content!r} is an ordinary word"
            yield Failure(CHECK, found, "a token that is parsed, as the tokenizer does")
            return


def _ordinary(tokens: list[str], kinds: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[Failure]:
    """Yield the first ordinary token of a different text or kind."""
    added = tokenizer.added_tokens_decoder
    for word, number in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        if number in added or number >= len(tokens):
            continue
        if tokens[number] != word:
            yield Failure(CHECK, f"token {number} is {tokens[number]!r}", f"{word!r}, as the tokenizer's")
            return
        if number < len(kinds) and kinds[number] != ORDINARY:
            yield Failure(CHECK, f"{word!r} is a token of kind {kinds[number]}", f"{ORDINARY}, a piece of text")
            return


def _merges(head: Head, merged: Path) -> Iterator[Failure]:
    """Yield the first merge that differs; nothing for a tokenizer without a tokenizer.json."""
    if not (file := merged / "tokenizer.json").is_file():
        return
    pairs = read_model_json(file)["model"].get("merges") or []
    wanted = [pair if isinstance(pair, str) else " ".join(part.replace(" ", "Ġ") for part in pair) for pair in pairs]
    found = head.get("tokenizer.ggml.merges", [])
    if found != wanted:
        at = first_difference(found, wanted)
        measured = f"{len(found)} merges, from {at} on {found[at : at + 2]}"
        yield Failure(CHECK, measured, f"{len(wanted)}, {wanted[at : at + 2]} there")
