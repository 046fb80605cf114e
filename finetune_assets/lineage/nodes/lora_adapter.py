"""lora_adapter: the trained adapter of the base model."""

from __future__ import annotations

from finetune_assets.lineage.cost import UNKNOWN, Cost, Known, ratio, seconds_of
from finetune_assets.lineage.identity import value_then
from finetune_assets.lineage.node import Node, Upstream, metrics_named, minor_versions
from finetune_assets.lineage.nodes.base_model import BaseFacts
from finetune_assets.lineage.nodes.dataset_info import split_rows
from finetune_assets.store.artifact import Artifact


def _cost(node: Node, known: Known) -> Cost:
    """Scale training by the rows that it sees, and the weights by the rank; loading and saving by the base alone."""
    past = known.past(node.name)
    scale = known.of(BaseFacts).scale(past)
    if past is None or scale is None:
        return UNKNOWN
    facts, seconds = past.metrics, seconds_of(past, node.code_version)
    if seconds is not None:
        training = min(facts.get("seconds", seconds), seconds)
        more = ratio(_rows_seen(known), facts.get("rows", 0) * facts.get("epochs", 0))
        seconds = (seconds - training + training * more) * scale
    weights = past.manifest["files"].get("adapter_model.safetensors", {"size": 0})["size"]
    larger = scale * _rank_ratio(past, known)
    return Cost(seconds, round(past.size + weights * (larger - 1)))


def _rows_seen(known: Known) -> float:
    train = known.recipe.train
    if train.max_steps > 0:
        return train.max_steps * train.per_device_train_batch_size * train.gradient_accumulation_steps
    return known.of(split_rows).get("train", 0) * train.num_train_epochs


def _rank_ratio(past: Artifact, known: Known) -> float:
    train, recipe = known.recipe.train, known.recipe
    # PiSSA is saved as plain LoRA of twice the rank
    now = train.lora_rank * (1 + train.pissa_init)
    return now / (value_then(past, recipe, "train.lora_rank") * (1 + value_then(past, recipe, "train.pissa_init")))


NODE = Node(
    "lora_adapter",
    reads=("train", "model.template", "model.default_system", "model.trust_remote_code"),
    upstreams=(Upstream("dataset_info", lambda _: ("train", "validation")), Upstream("base_model")),
    # torch: random numbers and the optimiser; transformers: batches, schedule and the model's code; trl: the loss, and
    # the settings that the recipe does not give; peft: how an adapter is initialised and scaled
    tools=lambda: minor_versions("torch", "transformers", "peft", "trl"),
    code_version="2",
    headline=metrics_named("rows", "steps", "final_loss", "validation_loss", "tokens_per_second", "peak_memory_gib"),
    cost=_cost,
)
