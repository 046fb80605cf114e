"""Choice of each tensor's type in a GGUF file: llama.cpp's choice for a file type.

A K-quant file is a mixture: the tensors that matter most get more bits. The rules are those of src/llama-quant.cpp in
llama.cpp b10605 (tensor_allows_quantization, llama_tensor_get_type, tensor_type_fallback), with one exception:
llama.cpp refuses rows that are not a multiple of 32, and we write them as F16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_assets.export.gguf.form import layer_of, place_of
from finetune_assets.models.formats.gguf import TENSOR_TYPES, Head, Tensor
from finetune_assets.recipe.gguf_types import TYPES
from finetune_assets.reporting.errors import StepFailed

# Parts of the names of matrices that are not quantised.
KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_first.weight",
    "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight", "time_mix_v1.weight",
    "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight", "time_mix_g1.weight",
    "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight",
    "attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd",
    ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
KEPT_WHOLE = ("position_embd.weight", "token_types.weight")

EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
OUTPUT = "output.weight"
VALUES = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")  # a fused matrix holds the values too

# The types that replace K-quants in rows that are not a multiple of 256.
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

# Numbers of layers by which llama.cpp recognises a 70B model, in which many heads share a value matrix.
LAYERS_OF_70B = {"llama": 80, "llama-embed": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}


def tensor_types(head: Head, kind: str, with_imatrix: bool = False) -> list[str]:
    """Return the type of each tensor of `head`, in its order, in a file of type `kind` (a key of `gguf_types.TYPES`).

    With an importance matrix, the first ffn_down matrices of q4_0 and q5_0 get types with a minimum (Q4_1, Q5_1).

    Raises:
        StepFailed: a model with experts has an ffn_down tensor outside its layers.
    """
    row = TYPES[kind]
    default = row.tensor_type
    choose = _Mixture(head, kind, default, with_imatrix).choose if row.is_quantised else lambda tensor: default
    chosen: dict[str, str] = {}
    for tensor in sorted(head.tensors, key=place_of):  # llama.cpp's counters go by this order
        chosen[tensor.name] = _fitting(tensor, choose(tensor)) if _is_quantised(tensor) else tensor.type
    return [chosen[tensor.name] for tensor in head.tensors]


def _is_quantised(tensor: Tensor) -> bool:
    is_matrix = any(size > 1 for size in tensor.shape[1:]) and tensor.name.endswith("weight")
    return is_matrix and tensor.name not in KEPT_WHOLE and not any(part in tensor.name for part in KEPT)


def _fitting(tensor: Tensor, wanted: str) -> str:
    """Return the wanted type, or the next type whose blocks fill the tensor's rows."""
    types = (wanted, FALLBACK.get(wanted, "F16"), "F16")
    return next(kind for kind in types if tensor.shape[0] % TENSOR_TYPES[kind].block == 0)


def _in_layers(index: int, count: int) -> bool:
    """Return whether a layer gets more bits: the first and last eighth of `count` layers, and every third between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


@dataclass(frozen=True)
class _Model:
    """The facts of a whole model that the choice depends on."""

    architecture: str
    layers: int
    experts: int
    queries_per_value: int  # query heads that share a key and value head, in the first layer
    is_70b: bool
    is_tied: bool  # no output matrix: the embeddings serve as one
    values: int  # number of value matrices


class _Mixture:
    """A choice of types for one tensor after the other, which counts the value and ffn_down matrices."""

    def __init__(self, head: Head, kind: str, default: str, with_imatrix: bool):
        self.model = _describe(head)
        self.kind = kind
        self.default = default
        self.with_imatrix = with_imatrix
        self.values_seen = 0
        self.downs_seen = 0

    def choose(self, tensor: Tensor) -> str:
        """Return the type for a matrix; queries, ffn_gate, ffn_up and unknown names get the default."""
        name = tensor.name
        if name == OUTPUT or (self.model.is_tied and name in EMBEDDINGS):
            return "Q8_0" if self.model.architecture == "falcon" or self.default == "Q8_0" else "Q6_K"
        if name in EMBEDDINGS:
            return self.default
        categories: list[tuple[tuple[str, ...], Callable[[str], str]]] = [
            (VALUES, self._value),
            (("attn_k.weight",), self._key),
            (("attn_output.weight",), self._attention_output),
            (("ffn_down",), self._ffn_down),
        ]
        for parts, chooser in categories:
            if any(part in name for part in parts):
                return chooser(name)
        return self.default

    def _value(self, _: str) -> str:
        model, index, wanted = self.model, self.values_seen, self.default
        self.values_seen += 1
        if model.experts == 8:
            return "Q8_0"  # small compared with the experts
        if self.kind == "q2_k":
            wanted = "Q4_K" if model.queries_per_value >= 4 else "Q3_K"
        elif self.kind == "q3_k_m":
            wanted = "Q5_K" if index < 2 else "Q4_K"
        elif self.kind == "q3_k_l" or (self.kind == "q4_k_s" and index < 4):
            wanted = "Q5_K"
        elif self.kind in ("q4_k_m", "q5_k_m") and _in_layers(index, model.values):
            wanted = "Q6_K"
        return "Q5_K" if model.is_70b and wanted in ("Q3_K", "Q4_K") else wanted

    def _key(self, _: str) -> str:
        return "Q8_0" if self.model.experts == 8 else self.default

    def _attention_output(self, _: str) -> str:
        if self.model.architecture == "falcon":
            return "Q4_K" if self.kind == "q3_k_l" else self.default
        if self.model.experts == 8:
            more = self.kind in ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m")
            return "Q5_K" if more else self.default
        return {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}.get(self.kind, self.default)

    def _ffn_down(self, name: str) -> str:
        kind, count, is_falcon = self.kind, self.model.layers, self.model.architecture == "falcon"
        index = self._layer_of_down(name)
        more = _in_layers(index, count)
        if kind == "q2_k":
            return "Q3_K"
        if kind == "q3_k_m":
            if index < count // 16:
                return "Q5_K"
            return "Q3_K" if is_falcon and not more else "Q4_K"
        if kind == "q3_k_l":
            return "Q4_K" if is_falcon else "Q5_K"
        if kind == "q4_k_m" and is_falcon:
            if index < count // 16:
                return "Q6_K"
            return "Q5_K" if more else "Q4_K"
        if kind in ("q4_k_m", "q5_k_m") and more:
            return "Q6_K"
        if kind == "q4_k_s" and not is_falcon and index < count // 8:
            return "Q5_K"
        if kind in ("q4_0", "q5_0") and self.with_imatrix and index < count // 8:
            return {"q4_0": "Q4_1", "q5_0": "Q5_1"}[kind]
        return self.default

    def _layer_of_down(self, name: str) -> int:
        """Return the number of earlier ffn_down matrices; with experts, which may have several per layer, the layer.

        In a model without experts, shared matrices therefore shift the count, as in llama.cpp.
        """
        if self.model.experts <= 1:
            self.downs_seen += 1
            return self.downs_seen - 1
        if not 0 <= (layer := layer_of(name)) < self.model.layers:
            raise StepFailed(f"tensor {name} is not in one of the model's {self.model.layers} layers")
        return layer


def _describe(head: Head) -> _Model:
    architecture = head.get("general.architecture", "")

    def number(key: str, default: int) -> int:
        value: Any = head.get(f"{architecture}.{key}", default)
        return value[0] if isinstance(value, list) else value  # one number for each layer: the first counts

    layers, experts = number("block_count", 0), number("expert_count", 0)
    if architecture == "nanbeige":
        layers *= number("num_loops", 1)  # it runs through its layers several times, and each time counts
    elif architecture == "graniteswitch":
        layers += 1  # the router that chooses an adapter
    heads = number("attention.head_count", 0)
    shared = number("attention.head_count_kv", heads)
    is_70b = layers > 0 and layers == LAYERS_OF_70B.get(architecture)
    if architecture.startswith("llama") and heads == shared:
        is_70b = False  # this is the first Llama, of 65B
    return _Model(
        architecture=architecture,
        layers=layers,
        experts=experts,
        queries_per_value=heads // shared if shared else 0,
        is_70b=is_70b,
        is_tied=all(tensor.name != OUTPUT for tensor in head.tensors),
        values=sum(any(part in tensor.name for part in VALUES) for tensor in head.tensors),
    )
