"""What a run would take: seconds, by past runs and what drives the work, and bytes on disk. Estimates, not promises.

An asset goes by what it was made last; one that was never made goes by the same asset of another recipe in the store.
What there is nothing to go by for is None.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.data.registry import data_file, load_entries
from finetune_assets.export.gguf.make import bytes_decided_by, figures_decided_by
from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.identity import default, fingerprint
from finetune_assets.lineage.plan import Planned
from finetune_assets.models.base_model import Local, local_files, locate
from finetune_assets.models.formats.safetensors import BYTES_OF, FLOATS, read_head
from finetune_assets.recipe import Recipe
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.store.artifact import Artifact
from finetune_assets.store.artifact_store import ArtifactStore

if TYPE_CHECKING:
    from finetune_assets.models.hub import Announced

# Bits for each weight of Llama 3.1 8B in a GGUF file of each type; other models mix their types a little otherwise.
# https://github.com/ggml-org/llama.cpp/blob/master/tools/quantize/README.md, and export.type_policy, which agrees.
BITS = {
    "f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.50, "q6_k": 6.56, "q5_k_m": 5.70, "q5_k_s": 5.57, "q5_1": 6.04,
    "q5_0": 5.57, "q4_k_m": 4.89, "q4_k_s": 4.67, "q4_1": 5.10, "q4_0": 4.64, "q3_k_l": 4.30, "q3_k_m": 4.00,
    "q3_k_s": 3.64, "q2_k": 3.16,
}  # fmt: skip
COUNTED = 64_000_000  # bytes: the rows of a larger data file are not counted for an estimate
LINKED = 4096  # bytes of an Ollama model in our own store beside its weights, which are a link


@dataclass(frozen=True)
class Cost:
    """What making an asset takes; None: nothing to go by. `scratch`: bytes that it needs meanwhile and gives back."""

    seconds: float | None
    bytes: int | None
    scratch: int = 0


@dataclass(frozen=True)
class Total:
    """What a run takes; `at_most`: with the assets that may come out as they were.

    `untimed` and `unsized` are the assets that are not in the seconds, or not in the bytes.
    """

    seconds: float
    seconds_at_most: float
    bytes: int
    bytes_at_most: int
    scratch: int
    untimed: tuple[str, ...]
    unsized: tuple[str, ...]


def costs(
    recipe: Recipe,
    project: Project,
    plan: Mapping[str, Planned],
    store: ArtifactStore,
    *,
    also: Collection[str] = (),
    announced: Announced | None = None,
) -> dict[str, Cost]:
    """The cost of every asset of a plan that is not fresh, and of those that are to be made although they are.

    Args:
        announced: what a hub says of a base model that was never made.
    """
    known = _Known(recipe, project, plan, store, announced)
    return {name: _cost(name, known) for name, item in plan.items() if item.state != "fresh" or name in also}


def _cost(name: str, known: _Known) -> Cost:
    """Unknown where a past run's record says less than this release would, or something else."""
    try:
        return COSTS[name](known)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
        return Cost(None, None)


def total(plan: Mapping[str, Planned], found: Mapping[str, Cost]) -> Total:
    """The sum over the assets that will run, and the sum with those that may."""
    will = [cost for name, cost in found.items() if plan[name].state != "maybe"]
    return Total(
        seconds=sum(cost.seconds or 0 for cost in will),
        seconds_at_most=sum(cost.seconds or 0 for cost in found.values()),
        bytes=sum(cost.bytes or 0 for cost in will),
        bytes_at_most=sum(cost.bytes or 0 for cost in found.values()),
        scratch=max((cost.scratch for cost in found.values()), default=0),
        untimed=tuple(name for name, cost in found.items() if cost.seconds is None),
        unsized=tuple(name for name, cost in found.items() if cost.bytes is None),
    )


class _Known:
    """What can be known without running anything."""

    def __init__(
        self,
        recipe: Recipe,
        project: Project,
        plan: Mapping[str, Planned],
        store: ArtifactStore,
        announced: Announced | None,
    ):
        self.recipe = recipe
        self.project = project
        self.plan = plan
        self.store = store
        self.announced = announced

    def past(self, asset: str) -> Artifact | None:
        """What to go by: the asset's current artifact, else its newest, else the newest of any recipe."""
        if (own := self.store.current(self.recipe.name, asset)) is not None:
            return own
        if made := self.store.published(self.recipe.name, asset):
            return made[-1]
        recipes = [path.name for path in self.store.root.iterdir() if path.is_dir()] if self.store.root.is_dir() else []
        found = [artifact for recipe in recipes for artifact in self.store.published(recipe, asset)]
        return max(found, key=lambda artifact: artifact.created, default=None)

    def scale(self, past: Artifact) -> float | None:
        """How much larger today's base model is than the one of a past run."""
        if self.base_bytes is None:
            return None
        base = self._base_of(past)
        if base is None:  # removed since
            return 1.0 if past.manifest["recipe"] == self.recipe.name else None
        return self.base_bytes / max(base.size, 1)

    def _base_of(self, past: Artifact) -> Artifact | None:
        recipe, step = past.manifest["recipe"], past
        for above in ("gguf_file", "merged_model", "base_model"):
            if above in step.inputs:
                step = self.store.get(recipe, above, step.inputs[above])
                if step is None:
                    return None
        return step if step is not past else None

    @cached_property
    def base(self) -> Artifact | None:
        """Today's base model, if it was ever made, for whatever recipe."""
        if (there := self.plan["base_model"].artifact) is not None:
            return there
        past = self.past("base_model")
        model = self.recipe.model
        if past is None or then(past, self.recipe, "model.model_name_or_path") != model.model_name_or_path:
            return None
        return past

    @cached_property
    def base_folder(self) -> Path | None:
        if self.base is not None:
            return self.base.path
        source = locate(self.recipe.model, self.project.root)
        return source.folder if isinstance(source, Local) else None

    @cached_property
    def base_bytes(self) -> int | None:
        if self.base is not None:
            return self.base.size
        if self.base_folder is not None:
            return sum(path.stat().st_size for path in local_files(self.base_folder, self.recipe.model).values())
        return self.announced.bytes if self.announced is not None else None

    @cached_property
    def weights(self) -> Counter[str]:
        """Elements of the base model's weights by dtype (safetensors' names)."""
        if self.base_folder is not None:
            return weights_of(self.base_folder)
        known = self.announced.weights if self.announced is not None else Counter()
        return Counter({name: count for name, count in known.items() if name in BYTES_OF})

    @property
    def merged_bytes(self) -> int:
        """Of the merged model's weights."""
        dtype = self.recipe.export.export_dtype
        return sum(count * BYTES_OF[name if dtype == "auto" else FLOATS[dtype]] for name, count in self.weights.items())

    @property
    def natural_type(self) -> str:
        """The GGUF type that the merged model is converted to before anything else."""
        dtype = self.recipe.export.export_dtype
        stored = set(self.weights) if dtype == "auto" else {FLOATS[dtype]}
        return {"BF16": "bf16", "F16": "f16"}.get("".join(stored), "f32")

    @cached_property
    def rows(self) -> Mapping[str, int]:
        """Rows of each split, as they are or will be; empty where there is no saying."""
        data = self.plan["dataset_info"].artifact
        if data is None:
            section = self.recipe.dataset
            counts = [count_rows(file, column) for file, column in self._data_files()]
            if None not in counts:
                kept = sum(min(count or 0, section.max_samples or COUNTED) for count in counts)
                test, validation = (_held_out(size, kept) for size in (section.test_size, section.val_size))
                return {"train": max(kept - test - validation, 1), "validation": validation, "test": test}
            data = self.past("dataset_info")
        return data.metrics["rows"] if data is not None else {}

    @property
    def source_bytes(self) -> int:
        return sum(file.stat().st_size for file, _ in self._data_files())

    def _data_files(self) -> list[tuple[Path, str]]:
        """The data files, and the column of their answers."""
        folder = self.project.root / self.recipe.dataset.dataset_dir
        entries = load_entries(folder, self.recipe.dataset.dataset)
        return [(data_file(folder, entry), entry.columns.response) for entry in entries.values()]


def _raw_dataset(known: _Known) -> Cost:
    return Cost(_seconds(known.past("raw_dataset")), known.source_bytes)


def _dataset_info(known: _Known) -> Cost:
    past = known.past("dataset_info")
    if past is None:
        return Cost(None, known.source_bytes)  # the same words, laid out otherwise
    more = _ratio(sum(known.rows.values()), sum(past.metrics["rows"].values()))
    return Cost(_times(_seconds(past), more), round(past.size * more))


def _base_model(known: _Known) -> Cost:
    return Cost(_seconds(known.base), known.base_bytes)


def _lora_adapter(known: _Known) -> Cost:
    """Training goes by the rows that it sees, loading and saving do not; weights go by the rank."""
    past = known.past("lora_adapter")
    if past is None or (scale := known.scale(past)) is None:
        return Cost(None, None)
    train, facts = known.recipe.train, past.metrics
    seen = known.rows.get("train", 0) * train.num_train_epochs
    if train.max_steps > 0:
        seen = train.max_steps * train.per_device_train_batch_size * train.gradient_accumulation_steps
    more = _ratio(seen, facts.get("rows", 0) * facts.get("epochs", 0))
    seconds = _seconds(past)
    if seconds is not None:
        training = min(facts.get("seconds", seconds), seconds)
        seconds = (seconds - training + training * more) * scale
    weights = past.manifest["files"].get("adapter_model.safetensors", {"size": 0})["size"]
    rank, rank_then = train.lora_rank, then(past, known.recipe, "train.lora_rank")
    # PiSSA is saved as plain LoRA of twice the rank
    twice, twice_then = 1 + train.pissa_init, 1 + then(past, known.recipe, "train.pissa_init")
    larger = scale * (rank * twice) / (rank_then * twice_then)
    return Cost(seconds, round(past.size + weights * (larger - 1)))


def _eval_metrics(known: _Known) -> Cost:
    """The answers take the time: rows, and tokens of each."""
    past = known.past("eval_metrics")
    if past is None or (scale := known.scale(past)) is None:
        return Cost(None, None)
    section, facts = known.recipe.evaluate, past.metrics
    rows = min(known.rows.get("test", 0), section.max_samples or COUNTED)
    answered = facts.get("answered", 0)
    tokens = _ratio(rows * section.max_new_tokens, answered * facts.get("max_new_tokens", 0))
    return Cost(_times(_seconds(past), tokens * scale), round(past.size * _ratio(rows, answered)))


def _merged_model(known: _Known) -> Cost:
    past = known.past("merged_model")
    scale = known.scale(past) if past is not None else None
    seconds = _times(_seconds(past), scale)
    if known.weights and known.base_bytes:
        stored = sum(count * BYTES_OF[name] for name, count in known.weights.items())
        return Cost(seconds, known.merged_bytes + max(known.base_bytes - stored, 0))
    return Cost(seconds, round(past.size * scale) if past is not None and scale is not None else None)


def _gguf_file(known: _Known) -> Cost:
    """Of the types that are wanted, those that are not kept from before take space, those not yet proven take time."""
    types = known.recipe.gguf.types
    past = known.past("gguf_file")
    scale = known.scale(past) if past is not None else None
    kept, proven = _kept_types(known, past)
    missing = [kind for kind in types if kind not in kept]
    seconds = None
    if past is not None:
        # Converting, and reading with the merged model, is for all types and takes about as long as one. Each run made
        # some of its types, and nobody wrote down how many: the slowest made most.
        runs = [run for run in known.store.published(past.manifest["recipe"], "gguf_file") if run.metrics.get("types")]
        each = [taken / (1 + len(run.metrics["types"])) for run in runs if (taken := _seconds(run)) is not None]
        unproven = len([kind for kind in types if kind not in proven])
        seconds = _times(max(each, default=None), (1 + unproven) * (scale or 0) if unproven else 0)
    sizes = [size for kind in missing if (size := gguf_bytes(known, past, scale, kind)) is not None]
    natural = known.natural_type
    needs_source = bool(missing) and natural not in types and natural not in kept
    scratch = round(known.weights.total() * BITS[natural] / 8) if needs_source else 0
    return Cost(seconds if scale is not None else None, sum(sizes) if len(sizes) == len(missing) else None, scratch)


def gguf_bytes(known: _Known, past: Artifact | None, scale: float | None, kind: str) -> int | None:
    """The size of one GGUF file: what it was before, else by the number of weights."""
    before = past.metrics["types"].get(kind) if past is not None else None
    if before is not None and scale is not None:
        return round(before["bytes"] * scale)
    return round(known.weights.total() * BITS[kind] / 8) if known.weights else None


def _kept_types(known: _Known, past: Artifact | None) -> tuple[set[str], set[str]]:
    """The types whose files the next run keeps, and those whose comparison with the merged model it keeps, too."""
    node, item = NODES["gguf_file"], known.plan["gguf_file"]
    upstreams = {up.asset: artifact for up in node.upstreams if (artifact := known.plan[up.asset].artifact)}
    own = past is not None and past.manifest["recipe"] == known.recipe.name and past.fingerprint != item.wanted
    if past is None or not own or len(upstreams) < len(node.upstreams):
        return set(), set()
    wanted = fingerprint(node, known.recipe, upstreams, {}).ingredients
    made, types = past.manifest["ingredients"], past.metrics["types"]

    def same(decided_by: Callable[[Mapping[str, Any], str], Any]) -> set[str]:
        return {kind for kind in types if decided_by(made, kind) == decided_by(wanted, kind)}

    return same(bytes_decided_by), same(figures_decided_by)


def _ollama_model(known: _Known) -> Cost:
    """Our own store links the weights; a server copies them."""
    past = known.past("ollama_model")
    copied = past is not None and past.metrics.get("where") == "server"
    gguf = known.past("gguf_file")
    scale = known.scale(gguf) if gguf is not None else None
    kinds = set(known.recipe.served.values()) if copied else set()
    sizes = [gguf_bytes(known, gguf, scale, kind) for kind in kinds]
    return Cost(_seconds(past), None if None in sizes else sum(size or 0 for size in sizes) + LINKED)


COSTS = {
    "raw_dataset": _raw_dataset,
    "dataset_info": _dataset_info,
    "base_model": _base_model,
    "lora_adapter": _lora_adapter,
    "eval_metrics": _eval_metrics,
    "merged_model": _merged_model,
    "gguf_file": _gguf_file,
    "ollama_model": _ollama_model,
}


def then(past: Artifact, recipe: Recipe, key: str) -> Any:
    """The value that a recipe key had when an artifact was made."""
    section, _, field = key.partition(".")
    return past.manifest["ingredients"]["recipe"].get(key, default(getattr(recipe, section), field))


def count_rows(file: Path, answers: str) -> int | None:
    """About how many rows a data file has, without parsing it: how often the column of the answers is named."""
    if file.stat().st_size > COUNTED:
        return None
    return file.read_bytes().count(json.dumps(answers, ensure_ascii=False).encode())


def weights_of(folder: Path) -> Counter[str]:
    """Elements by dtype of the safetensors files in a folder, from their heads; empty where they cannot be read."""
    found: Counter[str] = Counter()
    try:
        for path in folder.glob("*.safetensors"):
            for tensor in read_head(path)[1].values():
                if tensor["dtype"] in BYTES_OF:
                    found[tensor["dtype"]] += math.prod(tensor["shape"])
    except (OSError, StepFailed):
        return Counter()
    return found


def _seconds(past: Artifact | None) -> float | None:
    """How long a past run took, if the step did then what it does today."""
    if past is None or past.manifest["ingredients"].get("code_version") != NODES[past.manifest["asset"]].code_version:
        return None
    return past.manifest.get("seconds")


def _times(value: float | None, factor: float | None) -> float | None:
    return None if value is None or factor is None else value * factor


def _ratio(now: float, before: float) -> float:
    """How much more than before; as much, where that is not on record."""
    return now / before if now and before else 1.0


def _held_out(size: float, rows: int) -> int:
    return round(size if size >= 1 else size * rows)
