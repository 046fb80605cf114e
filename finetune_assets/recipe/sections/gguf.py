"""Section `gguf`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from finetune_assets.recipe.did_you_mean import did_you_mean
from finetune_assets.recipe.gguf_types import TYPES
from finetune_assets.recipe.sections.section import Names, Section

GGUF_TYPES = tuple(TYPES)  # largest first


def _no_test_rows(value: object) -> object:
    if value == "test":
        raise ValueError(
            "the test split measures the files, so it must not influence how they are made; use train or validation"
        )
    return value


class GgufSection(Section):
    """The GGUF files to write."""

    types: Names = Field(
        default=["f16", "q8_0"], min_length=1, description="GGUF types to write, each to its own file."
    )
    max_kl: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="Limit of the mean KL divergence from the merged model, for each type; the step fails above it. "
        "Types without an entry have default limits. Unit: nats per token.",
    )
    imatrix: Annotated[Literal["train", "validation"] | None, BeforeValidator(_no_test_rows)] = Field(
        default=None,
        description="Split from which llama.cpp's importance matrix is computed, for the types from q6_k down; "
        "without it, every weight counts the same.",
    )

    @field_validator("types", "max_kl")
    @classmethod
    def _known(cls, types: list[str] | dict[str, float]) -> list[str] | dict[str, float]:
        for name in types:
            if name not in GGUF_TYPES:
                raise ValueError(f"unknown GGUF type {name!r}{did_you_mean(name, GGUF_TYPES)}")
        return types if isinstance(types, dict) else list(dict.fromkeys(types))
