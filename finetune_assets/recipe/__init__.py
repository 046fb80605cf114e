"""The recipe: the typed declaration of one lineage, and the project that holds it.

This room knows nothing of what the values do. Front door: this module, which hands names on; `recipe.file` reads files.
"""

from finetune_assets.recipe.did_you_mean import did_you_mean
from finetune_assets.recipe.recipe import Recipe, name_problem
from finetune_assets.recipe.sections.dataset import DATASETS, DatasetSection
from finetune_assets.recipe.sections.evaluate import EvaluateSection
from finetune_assets.recipe.sections.export import ExportSection
from finetune_assets.recipe.sections.gguf import GGUF_TYPES, GgufSection
from finetune_assets.recipe.sections.model import ModelSection
from finetune_assets.recipe.sections.ollama import OllamaSection
from finetune_assets.recipe.sections.schedule import ScheduleSection
from finetune_assets.recipe.sections.section import Section
from finetune_assets.recipe.sections.train import TrainSection

__all__ = [
    "DATASETS",
    "GGUF_TYPES",
    "DatasetSection",
    "EvaluateSection",
    "ExportSection",
    "GgufSection",
    "ModelSection",
    "OllamaSection",
    "Recipe",
    "ScheduleSection",
    "Section",
    "TrainSection",
    "did_you_mean",
    "name_problem",
]
