"""Section `dataset`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from finetune_assets.recipe.sections.section import LONGEST_PATH, Names, Section

DATASETS = "datasets"  # group of the data sets' nodes; no recipe can have this name


class DatasetSection(Section):
    """The registered data sets to train on, and how to split them."""

    dataset: Annotated[
        Names,
        Field(min_length=1, max_length=1000, description="Names of data sets in dataset_info.json: a list, or 'a,b'."),
    ]
    dataset_dir: str = Field(
        default="data",
        max_length=LONGEST_PATH,
        description="Folder that holds dataset_info.json, relative to the project.",
    )
    max_samples: int | None = Field(
        default=None, ge=1, description="Most rows taken from each data set; without it, all. Unit: rows."
    )
    val_size: float = Field(
        default=0.0,
        ge=0,
        description="Size of the validation split, which measures the loss during training. "
        "Unit: share of each data set below 1, else rows.",
    )
    test_size: float = Field(
        default=0.05,
        ge=0,
        description="Size of the test split, which scores the model and is never trained on. "
        "Unit: share of each data set below 1, else rows.",
    )
    seed: int = Field(
        default=42, description="Seed that decides which rows are sampled and which are held out. No unit."
    )

    @field_validator("dataset")
    @classmethod
    def _named(cls, names: list[str]) -> list[str]:
        if not all(0 < len(name) <= 200 for name in names):
            raise ValueError("the name of a data set must have 1 to 200 characters")
        return names

    @field_validator("val_size", "test_size")
    @classmethod
    def _whole_rows(cls, size: float) -> float:
        if size > 1 and not size.is_integer():
            raise ValueError(f"cannot hold out {size:g} rows: write a share below 1, or a whole number of rows")
        return size
