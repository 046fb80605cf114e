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
            "the test rows are what the files are measured by, so they must have no say in how the files are made; "
            "take train or validation"
        )
    return value


class GgufSection(Section):
    """Which GGUF files to make."""

    types: Names = Field(default=["f16", "q8_0"], min_length=1, description="GGUF types, each its own file")
    max_kl: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="Type: how far its next-token distributions may be from the merged model's (mean KL divergence, "
        "nats per token) before the step fails; types that are not named have limits of their own",
    )
    imatrix: Annotated[Literal["train", "validation"] | None, BeforeValidator(_no_test_rows)] = Field(
        default=None,
        description="Rows by which the model shows which weights matter: the types from q6_k down are rounded by that "
        "(llama.cpp's importance matrix); left out: all weights matter alike",
    )

    @field_validator("types", "max_kl")
    @classmethod
    def _known(cls, types: list[str] | dict[str, float]) -> list[str] | dict[str, float]:
        for name in types:
            if name not in GGUF_TYPES:
                raise ValueError(f"unknown GGUF type {name!r}{did_you_mean(name, GGUF_TYPES)}")
        return types if isinstance(types, dict) else list(dict.fromkeys(types))
