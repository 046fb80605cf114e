"""Section `dataset`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from finetune_assets.recipe.sections.section import LONGEST_PATH, Names, Section

DATASETS = "datasets"  # what the nodes of data sets are called; no recipe can have the name


class DatasetSection(Section):
    """Which registered data sets to learn from, and how to split them."""

    dataset: Annotated[
        Names, Field(min_length=1, max_length=1000, description="Names in dataset_info.json (a list, or 'a,b')")
    ]
    dataset_dir: str = Field(
        default="data", max_length=LONGEST_PATH, description="Folder of dataset_info.json, relative to the project"
    )
    max_samples: int | None = Field(default=None, ge=1, description="At most this many rows of each data set")
    val_size: float = Field(
        default=0.0, ge=0, description="Rows watched during training: a share below 1, else a count"
    )
    test_size: float = Field(
        default=0.05, ge=0, description="Rows never trained on, for the scores: a share below 1, else a count"
    )
    seed: int = Field(default=42, description="Decides which rows are held out")

    @field_validator("dataset")
    @classmethod
    def _named(cls, names: list[str]) -> list[str]:
        if not all(0 < len(name) <= 200 for name in names):
            raise ValueError("a data set's name has 1 to 200 characters")
        return names

    @field_validator("val_size", "test_size")
    @classmethod
    def _whole_rows(cls, size: float) -> float:
        if size > 1 and not size.is_integer():
            raise ValueError(f"{size:g} rows cannot be held out: give a share below 1, or a whole number of rows")
        return size
