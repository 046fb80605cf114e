"""Section `export`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune_assets.recipe.sections.section import Section


class ExportSection(Section):
    """How the merged model is written."""

    export_size: float = Field(
        default=5, gt=0, le=1_000_000, description="Size of the largest safetensors shard. Unit: GB (10^9 bytes)."
    )
    export_dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="Data type of the merged weights; auto: that of the base model."
    )
    export_device: Literal["cpu", "auto"] = Field(
        default="cpu", description="Device that merges the adapter; auto: the accelerator, if there is one."
    )
