"""Section `export`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune_assets.recipe.sections.section import Section


class ExportSection(Section):
    """How the merged model is written."""

    export_size: float = Field(default=5, gt=0, le=1_000_000, description="Largest safetensors shard, in GB")
    export_dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="auto: the base model's own"
    )
    export_device: Literal["cpu", "auto"] = Field(
        default="cpu", description="Where base and adapter are added; auto: on the accelerator, if there is one"
    )
