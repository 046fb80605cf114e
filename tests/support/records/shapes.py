"""Models of many shapes, a few rows to a matrix: what llama.cpp's quantiser is asked about and ours is held against.

llama.cpp takes a file for a model once its metadata are there, whatever the sizes of its matrices, so every model here
is small. Weights and importance matrices are computed, the same on every machine.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune_assets.export.gguf.form import write_in_form
from finetune_assets.export.gguf.quantise import Imatrix
from finetune_assets.models.formats.gguf import Head, read_head
from finetune_assets.recipe.gguf_types import FILE_TYPES

Tensors = dict[str, tuple[int, ...]]  # name -> ggml's shape: columns first


@dataclass(frozen=True)
class Shape:
    """A model: `metadata` without the architecture's prefix, `kind` is the type of its matrices."""

    architecture: str
    metadata: Mapping[str, Any]
    tensors: Tensors
    kind: str = "f32"


def layers(count: int, matrices: Mapping[str, tuple[int, ...]], more: Mapping[str, tuple[int, ...]]) -> Tensors:
    """`matrices` in each of `count` layers, a norm each, and `more` outside them."""
    tensors = {f"{name}.weight": shape for name, shape in more.items()} | {"output_norm.weight": (256,)}
    for layer in range(count):
        tensors |= {f"blk.{layer}.{name}.weight": shape for name, shape in matrices.items()}
        tensors[f"blk.{layer}.attn_norm.weight"] = (256,)
    return tensors


def dense(hidden: int = 256, ffn: int = 512, rows: int = 2) -> Tensors:
    attention = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (hidden, rows))
    return {**attention, "ffn_gate": (hidden, rows), "ffn_up": (hidden, rows), "ffn_down": (ffn, rows)}


def experts(count: int, shared: bool = False) -> Tensors:
    attention = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (256, 2))
    matrices = {"ffn_gate_exps": (256, 2, count), "ffn_up_exps": (256, 2, count), "ffn_down_exps": (512, 2, count)}
    more = {"ffn_gate_shexp": (256, 2), "ffn_up_shexp": (256, 2), "ffn_down_shexp": (512, 2)} if shared else {}
    return {**attention, "ffn_gate_inp": (256, count), **matrices, **more}


def fused(ffn: int = 512) -> Tensors:
    return {"attn_qkv": (256, 6), "attn_output": (256, 2), "ffn_up": (256, 4), "ffn_down": (ffn, 2)}


def model(
    architecture: str = "llama",
    count: int = 16,
    matrices: Tensors | None = None,
    *,
    heads: tuple[Any, Any] = (8, 2),
    tied: bool = False,
    hidden: int = 256,
    kind: str = "f32",
    more: Tensors | None = None,
    **metadata: Any,
) -> Shape:
    """A model of `count` layers; `heads` are query heads and the heads that they share; dots in keys are `__`."""
    matrices = dense(hidden) if matrices is None else matrices
    ends: Tensors = {"token_embd": (hidden, 4), **({} if tied else {"output": (hidden, 4)}), **(more or {})}
    common: dict[str, Any] = {
        "context_length": 512, "embedding_length": hidden, "block_count": count, "feed_forward_length": 512,
        "attention__head_count": heads[0], "attention__head_count_kv": heads[1],
        "attention__layer_norm_rms_epsilon": 1e-5, "attention__layer_norm_epsilon": 1e-5, "vocab_size": 4,
    }  # fmt: skip
    given = {key.replace("__", "."): value for key, value in {**common, **metadata}.items()}
    return Shape(architecture, given, layers(count, matrices, ends), kind)


def of_experts(architecture: str, count: int, matrices: Tensors, number: int, **more: Any) -> Shape:
    metadata: dict[str, Any] = {"expert_count": number, "expert_used_count": 2, "expert_feed_forward_length": 512}
    return model(architecture, count, matrices, **metadata, **more)


def split_experts(count: int) -> Tensors:
    """Mixtral as it was converted at first: a matrix for each expert."""
    parts = {f"ffn_{part}.{number}": (256, 2) for part in ("gate", "up", "down") for number in range(count)}
    return {key: value for key, value in experts(count).items() if "_exps" not in key} | parts


LATENT = {"attention__kv_lora_rank": 256, "attention__q_lora_rank": 256, "expert_shared_count": 1}
DEEPSEEK = {
    "attn_q_a": (256, 2), "attn_q_b": (256, 2), "attn_kv_a_mqa": (256, 2), "attn_kv_b": (256, 4),
    "attn_output": (256, 2), "ffn_gate_inp": (256, 6), "ffn_gate_exps": (256, 2, 6), "ffn_up_exps": (256, 2, 6),
    "ffn_down_exps": (512, 2, 6), "ffn_down_shexp": (512, 2), "ffn_up_shexp": (256, 2),
}  # fmt: skip
SPLIT_LATENT = {key: value for key, value in DEEPSEEK.items() if key != "attn_kv_b"} | {
    "attn_k_b": (128, 4, 2), "attn_v_b": (256, 2, 2)
}  # fmt: skip
GEMMA_3N = dense() | {
    "altup_router": (256, 4), "altup_correct_coef": (4, 4), "laurel_l": (256, 2), "laurel_r": (64, 4),
    "inp_gate": (256, 2), "proj": (256, 2), "per_layer_post_norm": (256,),
}  # fmt: skip
LFM2 = {
    "shortconv.conv": (3, 4), "shortconv.in_proj": (256, 6), "shortconv.out_proj": (256, 2), "ffn_gate": (256, 2),
    "ffn_up": (256, 2), "ffn_down": (512, 2),
}  # fmt: skip
MAMBA = {
    "ssm_in": (256, 4), "ssm_conv1d": (4, 8), "ssm_x": (512, 2), "ssm_dt": (16, 8), "ssm_a": (16, 8),
    "ssm_out": (512, 2),
}  # fmt: skip
RWKV = {
    "time_mix_key": (256, 2), "time_mix_value": (256, 2), "time_mix_output": (256, 2), "time_mix_w1": (256, 2),
    "time_mix_w2": (32, 2), "time_mix_first": (64, 4), "time_mix_decay_w1": (256, 2), "time_mix_decay_w2": (64, 2),
    "time_mix_lerp_fused": (256, 1, 1, 5), "channel_mix_key": (256, 2), "channel_mix_value": (512, 2),
    "channel_mix_receptance": (256, 2),
}  # fmt: skip


def t5() -> Shape:
    """An encoder and a decoder: no layer's name begins as llama.cpp expects where it counts."""
    tensors: Tensors = {"token_embd.weight": (256, 4), "output.weight": (256, 4), "enc.output_norm.weight": (256,)}
    for part in ("enc", "dec"):
        tensors[f"{part}.blk.0.attn_rel_b.weight"] = (8, 32)
        for layer in range(12):
            tensors |= {f"{part}.blk.{layer}.{name}.weight": shape for name, shape in dense().items()}
            if part == "dec":
                tensors |= {f"dec.blk.{layer}.cross_attn_{name}.weight": (256, 2) for name in "qkv"}
    return Shape("t5", model("t5", 12, attention__relative_buckets_count=32).metadata, tensors)


SHAPES = {
    # dense models: how many layers, which heads share, one matrix for embeddings and output or two
    "one layer": model(count=1),
    "two layers": model(count=2, heads=(8, 8)),
    "seven layers": model(count=7, kind="f16"),
    "eight layers": model(count=8, kind="bf16"),
    "nine layers, tied": model(count=9, tied=True),
    "16 layers": model(heads=(32, 8)),
    "three to a head": model(heads=(9, 3), hidden=288, matrices=dense(288, 768), tied=True),
    "33 layers, tied": model(count=33, heads=(8, 8), tied=True, kind="f16"),
    "64 layers": model(count=64, kind="bf16"),
    "70B": model(count=80, heads=(64, 8)),
    "65B": model(count=80, heads=(64, 64)),
    "qwen2 72B": model("qwen2", 80, heads=(64, 8)),
    "qwen3 of 80 layers": model("qwen3", 80, heads=(64, 8)),
    "deci 70B, no attention in the first layer": model("deci", 80, heads=(64, [0, *[8] * 79]), tied=False),
    "olmo of 80 layers": model("olmo", 80, heads=(64, 64), tied=True),
    "jais2 70B": model("jais2", 68),
    "more rows than a block": model(count=2, matrices=dense(rows=70), kind="f16"),
    # rows that no block of 256 fills, and that none of 32 does
    "rows of 288": model(hidden=288, matrices=dense(288, 544), kind="f16"),
    "rows of 96, tied": model(hidden=96, matrices=dense(96, 160), tied=True),
    "some rows of 328": model(matrices=dense(ffn=328), count=4),
    "some rows of 100, tied": model(matrices=dense() | {"attn_k": (100, 2)}, count=4, tied=True, kind="bf16"),
    "rows of 200": model(hidden=200, matrices=dense(200, 520), count=4),
    # fused and special matrices
    "falcon": model("falcon", 32, fused(), heads=(8, 1)),
    "falcon, tied": model("falcon", 20, fused(), tied=True),
    "phi3": model("phi3", 32, fused(), rope__dimension_count=32),
    "gpt2": model("gpt2", 12, fused(), more={"position_embd": (256, 4)}),
    "starcoder2": model("starcoder2", 10, dense(), tied=True),
    "gemma": model("gemma", 18, tied=True, heads=(8, 1), attention__key_length=256, attention__value_length=256),
    "gemma2": model("gemma2", 26, tied=True, kind="bf16", attention__sliding_window=64),
    "gemma3": model("gemma3", 34, tied=True, kind="bf16", attention__sliding_window=64),
    "gemma3n": model(
        "gemma3n", 8, GEMMA_3N, tied=True, attention__sliding_window=64,
        more={"per_layer_token_embd": (512, 4), "per_layer_model_proj": (256, 4), "altup_proj": (256, 2, 3)},
    ),
    "lfm2": model("lfm2", 10, LFM2, tied=True, heads=(8, [0, *[2] * 9]), shortconv__l_cache=3),
    "mamba": model(
        "mamba", 12, MAMBA, tied=True, heads=(0, 0), ssm__conv_kernel=4, ssm__inner_size=512, ssm__state_size=16,
        ssm__time_step_rank=16,
    ),
    "rwkv6": model(
        "rwkv6", 12, RWKV, heads=(0, 0), wkv__head_size=64, time_mix_extra_dim=32, time_decay_extra_dim=64
    ),
    "t5": t5(),
    "nanbeige, three times through": model("nanbeige", 8, num_loops=3),
    "graniteswitch": model(
        "graniteswitch", 15, logit_scale=1.0, adapters__count=1, adapters__lora_rank=2,
        adapters__token_ids_activate=[1], adapters__token_ids_substitute=[2],
    ),
    # experts
    "8 experts": of_experts("llama", 32, experts(8), 8),
    "8 experts, tied": of_experts("llama", 9, experts(8), 8, tied=True, kind="f16"),
    "8 experts, a matrix each": of_experts("llama", 9, split_experts(8), 8, heads=(32, 8)),
    "4 experts": of_experts("llama", 12, experts(4), 4),
    "qwen3moe, 12 experts": of_experts("qwen3moe", 9, experts(12), 12, heads=(32, 4), kind="bf16"),
    "qwen2moe, 6 experts and shared ones": of_experts("qwen2moe", 24, experts(6, shared=True), 6, heads=(8, 8)),
    "gpt-oss": of_experts("gpt-oss", 12, experts(16), 16, attention__sliding_window=64),
    "deepseek2": of_experts("deepseek2", 27, DEEPSEEK, 6, heads=(8, 8), **LATENT),
    "deepseek2, split": of_experts("deepseek2", 10, SPLIT_LATENT, 6, heads=(8, 1), tied=True, **LATENT),
}  # fmt: skip

BYTES = (
    "nine layers, tied", "more rows than a block", "rows of 288", "some rows of 100, tied", "falcon, tied",
    "8 experts, tied", "qwen3moe, 12 experts", "deepseek2, split",
)  # fmt: skip
"""The models whose bytes the tests compare as well; the others' are compared when the references are made."""


def numbers(name: str, count: int) -> np.ndarray:
    """`count` numbers between -1 and 1, most of them small; the same for the same name, wherever it runs."""
    return (2 * np.random.RandomState(zlib.crc32(name.encode())).random_sample(count) - 1) ** 3


def weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor (rows first): the first layer has a row of zeros, one of equal values, and a few huge ones."""
    values = numbers(name, int(np.prod(shape))).reshape(-1, shape[0])
    if name.startswith("blk.0.") and len(shape) > 1:
        values[0] = 0
        values[1, : shape[0] // 2] = 0.25
        values[-1, 7::97] *= 1000
    return values.astype(np.float32).reshape(shape[::-1])


def write(shape: Shape, path: Path) -> Path:
    """The model as a GGUF file by the gguf package."""
    import gguf

    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_file_type(FILE_TYPES[shape.kind])
    for key, value in shape.metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}[type(value)]
        add(f"{shape.architecture}.{key}", value)
    for name, dimensions in shape.tensors.items():
        data = weights(name, dimensions)
        if len(dimensions) == 1 or shape.kind == "f32":
            writer.add_tensor(name, data)
        elif shape.kind == "f16":
            writer.add_tensor(name, data.astype(np.float16))
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def in_form(shape: Shape, path: Path) -> Path:
    """The model as a GGUF file in the form that ours have."""
    plain = write(shape, path.with_suffix(".plain"))
    write_in_form(plain, read_head(plain), path)
    plain.unlink()
    return path


def joined(sha256: Iterable[str]) -> str:
    """A digest of several."""
    return hashlib.sha256("".join(sha256).encode()).hexdigest()[:16]


def importance(shape: Shape) -> Imatrix:
    """An importance matrix with zeros, zeros only, an entry too few and one that is no model's."""
    values: dict[str, np.ndarray] = {"blk.0.nothing.weight": np.ones((1, 256), np.float32)}
    for name, dimensions in shape.tensors.items():
        if len(dimensions) > 1 and not name.startswith(("token_embd", "blk.1.attn_k")):
            matrices = dimensions[2] if len(dimensions) > 2 else 1
            found = np.square(numbers(f"{name} inputs", matrices * dimensions[0])).astype(np.float32)
            found[::13] = 0
            if name.startswith("blk.1.ffn_up"):
                found[:] = 0
            values[name] = found.reshape(matrices, dimensions[0])
    return Imatrix(values, file="imatrix.gguf", dataset="train.txt", chunks=3)


def digests(path: Path) -> dict[str, str]:
    """Tensor -> digest of its type and bytes."""
    head = read_head(path)
    with path.open("rb") as file:
        found: dict[str, str] = {}
        for tensor in head.tensors:
            file.seek(head.data_start + tensor.offset)
            found[tensor.name] = hashlib.sha256(tensor.type.encode() + file.read(tensor.nbytes)).hexdigest()
    return found


def digest(path: Path) -> str:
    """A digest of all tensors of a file, whatever their order."""
    found = digests(path)
    return hashlib.sha256("".join(found[name] for name in sorted(found)).encode()).hexdigest()[:12]


def described_file(source: Path, made: Path) -> str:
    types = {tensor.name: tensor.type for tensor in read_head(made).tensors}
    before = read_head(source)
    return described(before, [types[tensor.name] for tensor in before.tensors])


def described(before: Head, types: Iterable[str]) -> str:
    """The types of a file's matrices in a line: the most frequent one, then which others are in which layers.

    Norms and the like, with one dimension, are always kept and not named.
    """
    places: dict[str, dict[str, list[int]]] = {}
    count: dict[str, int] = {}
    for tensor, kind in zip(before.tensors, types, strict=True):
        if len(tensor.shape) > 1:
            found = re.fullmatch(r"((?:enc\.|dec\.)?)blk\.(\d+)\.(.*)", tensor.name)
            part, layer = (found[1] + found[3], int(found[2])) if found else (tensor.name, -1)
            places.setdefault(kind, {}).setdefault(part.removesuffix(".weight"), []).append(layer)
            count[kind] = count.get(kind, 0) + 1
    most = max(count, key=lambda kind: (count[kind], kind))
    parts = [
        f"{kind}: " + ", ".join(f"{part} {_ranges(numbers)}".rstrip() for part, numbers in sorted(places[kind].items()))
        for kind in sorted(places)
        if kind != most
    ]
    return "; ".join([most, *parts])


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5, 8, 11] as 0-2 5-11/3; nothing for a tensor outside the layers."""
    parts: list[str] = []
    left = [number for number in sorted(numbers) if number >= 0]
    while left:
        step = left[1] - left[0] if len(left) > 1 else 1
        count = 1
        while count < len(left) and left[count] == left[0] + count * step:
            count += 1
        count = count if count > 2 or step == 1 else 1
        end = f"-{left[count - 1]}" if count > 1 else ""
        parts.append(f"{left[0]}{end}{f'/{step}' if end and step > 1 else ''}")
        left = left[count:]
    return " ".join(parts)
