"""eval_metrics: scores of the base model and of the trained model on the test split."""

from __future__ import annotations

from finetune_assets.lineage.cost import UNKNOWN, Cost, Known, at_most, ratio, seconds_of, times
from finetune_assets.lineage.node import Node, Upstream, exact_versions, metrics_named
from finetune_assets.lineage.nodes.base_model import BaseFacts
from finetune_assets.lineage.nodes.dataset_info import split_rows

HEADLINE = tuple(
    f"{side}.{name}" for name in ("bleu-4", "rouge-1", "rouge-l", "perplexity") for side in ("base", "tuned")
)


def _cost(node: Node, known: Known) -> Cost:
    """Scale by the rows answered, and by the tokens of each answer."""
    past = known.past(node.name)
    scale = known.of(BaseFacts).scale(past)
    if past is None or scale is None:
        return UNKNOWN
    section, facts = known.recipe.evaluate, past.metrics
    rows = at_most(known.of(split_rows).get("test", 0), section.max_samples)
    answered = facts.get("answered", 0)
    tokens = ratio(rows * section.max_new_tokens, answered * facts.get("max_new_tokens", 0))
    seconds = times(seconds_of(past, node.code_version), tokens * scale)
    return Cost(seconds, round(past.size * ratio(rows, answered)))


NODE = Node(
    "eval_metrics",
    reads=("evaluate", "train.cutoff_len", "model.trust_remote_code"),
    upstreams=(
        Upstream("dataset_info", lambda _: ("train", "test")),
        Upstream("base_model"),
        Upstream("lora_adapter"),
    ),
    # the segmenter and the smoothing decide the scores; the same weights give the same answers in any torch, and an
    # adapter trained by a different torch is a different upstream
    tools=lambda: exact_versions("jieba", "nltk"),
    headline=metrics_named(*HEADLINE),
    cost=_cost,
)
