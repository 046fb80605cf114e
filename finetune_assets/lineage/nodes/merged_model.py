"""merged_model: the adapter added to the weights of the base model."""

from __future__ import annotations

from finetune_assets.lineage.cost import Cost, Known, seconds_of, times
from finetune_assets.lineage.node import Node, Upstream, metrics_named
from finetune_assets.lineage.nodes.base_model import BaseFacts
from finetune_assets.models.formats.safetensors import BYTES_OF, FLOATS


def _cost(node: Node, known: Known) -> Cost:
    base, past = known.of(BaseFacts), known.past(node.name)
    scale = base.scale(past)
    seconds = times(seconds_of(past, node.code_version), scale)
    if base.weights and base.bytes:
        stored = sum(count * BYTES_OF[name] for name, count in base.weights.items())
        return Cost(seconds, _weight_bytes(known) + max(base.bytes - stored, 0))
    return Cost(seconds, round(past.size * scale) if past is not None and scale is not None else None)


def _weight_bytes(known: Known) -> int:
    dtype, weights = known.recipe.export.export_dtype, known.of(BaseFacts).weights
    return sum(count * BYTES_OF[name if dtype == "auto" else FLOATS[dtype]] for name, count in weights.items())


# No tools: sums and products in float32, which torch only rounds.
NODE = Node(
    "merged_model",
    reads=("export",),
    # test: on these rows the merged model is compared with base and adapter
    upstreams=(
        Upstream("dataset_info", lambda _: ("test",)),
        Upstream("base_model"),
        Upstream("lora_adapter"),
    ),
    code_version="3",
    headline=metrics_named("method", "tensors", "bytes"),
    cost=_cost,
)
