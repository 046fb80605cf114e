"""The recipe: the declaration of one lineage, from data to served model, typed and with defaults."""

from __future__ import annotations

import unicodedata

from pydantic import Field, model_validator

from finetune_assets.recipe.did_you_mean import did_you_mean
from finetune_assets.recipe.sections.dataset import DatasetSection
from finetune_assets.recipe.sections.evaluate import EvaluateSection
from finetune_assets.recipe.sections.export import ExportSection
from finetune_assets.recipe.sections.gguf import GgufSection
from finetune_assets.recipe.sections.model import ModelSection
from finetune_assets.recipe.sections.ollama import OllamaSection
from finetune_assets.recipe.sections.schedule import ScheduleSection
from finetune_assets.recipe.sections.section import Section
from finetune_assets.recipe.sections.train import TrainSection

LONGEST_NAME = 48  # characters of a recipe's name, which is also the name of a folder


class Recipe(Section):
    """One lineage: its data and base model, and how to train, score, export and serve the result."""

    name: str = Field(description="Name of the recipe file without .yaml; names the asset group and the job.")
    dataset: DatasetSection
    model: ModelSection
    train: TrainSection = Field(default_factory=TrainSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    export: ExportSection = Field(default_factory=ExportSection)
    gguf: GgufSection = Field(default_factory=GgufSection)
    ollama: OllamaSection
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)

    @model_validator(mode="after")
    def _served_type_is_written(self) -> Recipe:
        if self.ollama.type is not None and self.ollama.type not in self.gguf.types:
            raise ValueError(f"ollama.type {self.ollama.type!r} is not among gguf.types ({', '.join(self.gguf.types)})")
        for kind in self.ollama.types:
            if kind not in self.gguf.types:
                near = did_you_mean(kind, self.gguf.types)
                raise ValueError(f"ollama.types: {kind!r} is not among gguf.types{near}")
        return self

    @model_validator(mode="after")
    def _matrix_has_rows(self) -> Recipe:
        if self.gguf.imatrix == "validation" and not self.dataset.val_size:
            raise ValueError(
                "gguf.imatrix is validation, but dataset.val_size is 0: set it, or use gguf.imatrix: train"
            )
        return self

    @property
    def served_type(self) -> str:
        """Return the GGUF type that is served under the plain name."""
        return self.ollama.type or self.gguf.types[0]

    @property
    def served(self) -> dict[str, str]:
        """Return the GGUF type of each served name (with its tag), latest first."""
        tags = {"latest": self.served_type, **{kind: kind for kind in self.ollama.types}}
        return {f"{self.ollama.name}:{tag}": kind for tag, kind in tags.items()}

    @property
    def system(self) -> str | None:
        """Return the system prompt of the served model."""
        return self.model.default_system if self.ollama.system is None else self.ollama.system


def sections() -> dict[str, type[Section]]:
    """Return the sections of a recipe, by key."""
    fields = {key: field.annotation for key, field in Recipe.model_fields.items()}
    return {key: kind for key, kind in fields.items() if isinstance(kind, type) and issubclass(kind, Section)}


def name_problem(name: str) -> str | None:
    """Return why a text cannot be a recipe's name; None if it can.

    A name has letters of any script with their marks, digits, '_' and '-', and begins with a letter. Such a name is
    valid as a folder on every disk, and needs no quotes in a shell. Spaces, dots and signs are refused and not
    replaced, because `a b` and `a-b` would become the same name.
    """
    if len(name) > LONGEST_NAME or len(name.encode("utf-8", "surrogatepass")) > 4 * LONGEST_NAME:
        return f"it has {len(name)} characters (limit {LONGEST_NAME})"
    if not name or unicodedata.category(name[0])[0] != "L":
        return "it must begin with a letter"
    wrong = [char for char in name if char not in "_-" and unicodedata.category(char)[0] not in "LMN"]
    return f"use letters, digits, '_' and '-' only, not {wrong[0]!a}" if wrong else None
