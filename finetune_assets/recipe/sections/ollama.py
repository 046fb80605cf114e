"""Section `ollama`."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from finetune_assets.recipe.sections.section import Names, Section


class OllamaSection(Section):
    """How Ollama serves the model."""

    name: str = Field(description="Name of the model in Ollama, without a tag.")
    type: str | None = Field(
        default=None, description="GGUF type that is served under the plain name; without it, the first of gguf.types."
    )
    types: Names = Field(default=[], description="More GGUF types to serve, each as name:TYPE.")
    system: str | None = Field(
        default=None, description="System prompt of the served model; without it, model.default_system."
    )
    num_ctx: int = Field(default=2048, ge=64, description="Context window. Unit: tokens.")
    stop: Names = Field(default=[], description="Stop texts, in addition to those of the chat template.")
    temperature: float | None = Field(
        default=None, ge=0, description="Sampling temperature; without it, Ollama's default. No unit."
    )
    top_p: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Probability mass from which tokens are sampled; without it, Ollama's default. Unit: share.",
    )
    top_k: int | None = Field(
        default=None,
        ge=1,
        description="Number of most likely tokens that are sampled from; without it, Ollama's default. Unit: tokens.",
    )
    repeat_penalty: float | None = Field(
        default=None, gt=0, description="Penalty of repeated tokens; without it, Ollama's default. No unit."
    )

    @field_validator("name")
    @classmethod
    def _servable(cls, name: str) -> str:
        if not re.fullmatch(r"(?:[A-Za-z0-9_][A-Za-z0-9_-]{0,79}/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", name):
            raise ValueError(
                f"{name!r} is not a valid Ollama model name: "
                "use letters, digits, '.', '_' and '-'; begin with a letter, digit or '_'; use no '.' before a '/'"
            )
        return name

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError("a stop text is empty and would end every answer before its first token; remove it")
        return stop
