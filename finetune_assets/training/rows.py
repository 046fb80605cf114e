"""Rows of a split as token ids and labels; rows without a label are left out and counted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_assets.chat.template import Encoded, encode_row
from finetune_assets.data.rows import numbered_rows
from finetune_assets.recipe import ModelSection, TrainSection
from finetune_assets.reporting.errors import BadInput

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedRows:
    """Rows of one split that have at least one label.

    Attributes:
        rows: in the order of the file.
        cut: number of rows truncated at `cutoff_len`.
        dropped: number of rows left out, because no token of an answer is within `cutoff_len`.
    """

    rows: list[Encoded]
    cut: int
    dropped: int

    @property
    def tokens(self) -> int:
        """Number of tokens of all rows, prompts included."""
        return sum(len(row.input_ids) for row in self.rows)

    @property
    def learnt_tokens(self) -> int:
        """Number of tokens that have a label."""
        return sum(row.learnt for row in self.rows)

    def dataset(self) -> Dataset:
        """Return the rows as TRL expects them, tokenised: columns input_ids and labels."""
        from datasets import Dataset

        return Dataset.from_dict(
            {"input_ids": [row.input_ids for row in self.rows], "labels": [row.labels for row in self.rows]}
        )


def encode_file(
    path: Path, tokenizer: PreTrainedTokenizerBase, train: TrainSection, model: ModelSection
) -> EncodedRows:
    """Encode every row of a split.

    Raises:
        BadInput: a line is not a row, or the template cannot render it (the message names file and line).
    """
    encoded: list[Encoded] = []
    cut = dropped = 0
    for number, split_row in numbered_rows(path):
        try:
            row = encode_row(
                tokenizer,
                split_row["messages"],
                default_system=model.default_system,
                cutoff_len=train.cutoff_len,
                train_on_prompt=train.train_on_prompt,
                mask_history=train.mask_history,
            )
        except BadInput as error:
            raise BadInput(f"{path.name}, line {number}: {error.message}", error.hint) from error
        if row.learnt:
            encoded.append(row)
            cut += row.cut
        else:
            dropped += 1
    return EncodedRows(encoded, cut, dropped)
