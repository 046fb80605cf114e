"""The graph: the assets, upstreams first, and which of them read which.

An asset's fingerprint covers exactly what its node names. A step whose code changes its result gets a new
`code_version`. A new version of a library counts if it decides the result, not if it only rounds differently
(docs/identity.md has the table; every manifest records the full versions).
"""

from __future__ import annotations

from finetune_assets.lineage.node import Node
from finetune_assets.lineage.nodes import (
    base_model,
    dataset_info,
    eval_metrics,
    gguf_file,
    lora_adapter,
    merged_model,
    ollama_model,
    raw_dataset,
)

NODES: dict[str, Node] = {
    node.name: node
    for node in (
        raw_dataset.NODE,
        dataset_info.NODE,
        base_model.NODE,
        lora_adapter.NODE,
        eval_metrics.NODE,
        merged_model.NODE,
        gguf_file.NODE,
        ollama_model.NODE,
    )
}
"""Every asset, upstreams before downstreams."""


def upstream_of(names: set[str]) -> set[str]:
    """Return the named assets and everything that they read, directly or not."""
    assets = set(names)
    for node in reversed(NODES.values()):
        if node.name in assets:
            assets |= {up.asset for up in node.upstreams}
    return assets
