"""Instruction data in, a model served by Ollama out: fine-tuning as software-defined assets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune_assets.component import FinetuneRecipe

__version__ = "0.1.0"
__all__ = ["FinetuneRecipe", "__version__"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Load the Dagster component when it is asked for: the command line starts without Dagster."""
    if name == "FinetuneRecipe":
        from finetune_assets.component import FinetuneRecipe

        return FinetuneRecipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
