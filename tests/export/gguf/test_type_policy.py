"""Which type each tensor gets, that its bytes are ggml's, and that llama.cpp runs every file made so.

data/type_policy.json: `policy` and `real` are what llama.cpp's own quantiser chose and wrote for SmolLM2-135M-Instruct
(from float32) and for a random Llama; `tensors` are digests of what ggml_quantize_chunk makes of `WEIGHTS`.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_assets.export.gguf import converter
from finetune_assets.export.gguf.quantise import make_types
from finetune_assets.export.gguf.type_policy import tensor_types
from finetune_assets.models.formats.gguf import STRING, TENSOR_TYPES, UINT32, Head, Tensor, read_head
from finetune_assets.recipe import GGUF_TYPES
from finetune_assets.recipe.gguf_types import FILE_TYPES
from finetune_assets.reporting.errors import StepFailed
from tests.support.export_fixtures import converted, converter_cache, tiny_base, tiny_tokenizer

REFERENCE = json.loads((Path(__file__).parents[2] / "fixtures/type_policy.json").read_text())
MIXED = [kind for kind in GGUF_TYPES if kind not in ("f32", "f16", "bf16")]
STEPS = (np.arange(32 * 512, dtype=np.uint64) * 2654435761 % 2**32).astype(np.float64) / 2**31 - 1
WEIGHTS = (STEPS * STEPS * STEPS).astype(np.float32).reshape(32, 512)
Shapes = dict[str, tuple[int, ...]]


def head(architecture: str, shapes: Shapes, **numbers: int) -> Head:
    """The head of a file of float32; `numbers` are metadata (block_count=2)."""
    name = architecture.encode()
    raw = {"general.architecture": (STRING, struct.pack("<Q", len(name)) + name)}
    raw |= {
        f"{architecture}.{key.replace('__', '.')}": (UINT32, struct.pack("<I", value)) for key, value in numbers.items()
    }
    return Head(3, raw, tuple(Tensor(name, shape, 0, 0) for name, shape in shapes.items()), 0)


def model(architecture: str = "llama", *, layers: int = 16, heads: int = 16, shared: int = 16, **more: Any) -> Head:
    """A model without experts: rows of 1024, unless `hidden` and `ffn` say otherwise; `tied` leaves the output out."""
    hidden, ffn, tied, extra = (more.get(key, default) for key, default in DEFAULTS.items())
    matrices: Shapes = {
        "attn_k": (hidden, 256),
        "attn_output": (hidden, hidden),
        "attn_q": (hidden, hidden),
        "attn_v": (hidden, 256),
        "ffn_down": (ffn, hidden),
        "ffn_gate": (hidden, ffn),
        "ffn_up": (hidden, ffn),
        "attn_norm": (hidden,),
    }
    shapes: Shapes = {} if tied else {"output.weight": (hidden, 512)}
    shapes |= {"token_embd.weight": (hidden, 512), "output_norm.weight": (hidden,)}
    for layer in range(layers):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in (matrices | extra).items()}
    numbers = {"block_count": layers, "attention__head_count": heads, "attention__head_count_kv": shared}
    return head(architecture, shapes, **(numbers | more.get("numbers", {})))


DEFAULTS: dict[str, Any] = {"hidden": 1024, "ffn": 2048, "tied": False, "extra": {}}


def chosen(file: Head, kind: str) -> dict[str, str]:
    return {tensor.name: made for tensor, made in zip(file.tensors, tensor_types(file, kind), strict=True)}


def layers_of(file: Head, kind: str, name: str, wanted: str) -> list[int]:
    """The layers in which the tensor `name` has the wanted type."""
    types = chosen(file, kind)
    found = (layer for layer in range(200) if types.get(f"blk.{layer}.{name}.weight") == wanted)
    return list(found)


def test_every_type_of_a_recipe_is_made() -> None:
    import gguf

    assert set(FILE_TYPES) == set(GGUF_TYPES) == set(REFERENCE["real"])
    for kind, number in FILE_TYPES.items():
        assert gguf.LlamaFileType(number).name in (f"MOSTLY_{kind.upper()}", f"ALL_{kind.upper()}")
    for name, (number, block, size, _) in TENSOR_TYPES.items():
        assert gguf.GGMLQuantizationType(number).name == name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (block, size)


@pytest.mark.parametrize("kind", GGUF_TYPES)
@pytest.mark.parametrize("name", ["smol", "rand"])
def test_llama_cpp_chose_the_same(name: str, kind: str) -> None:
    if name == "smol":
        file = model(layers=30, heads=9, shared=3, hidden=576, ffn=1536, tied=True)
    else:
        file = model(layers=24, heads=16, shared=4, hidden=1024, ffn=2816)
    reference = dict(REFERENCE["policy"][name][kind])
    wanted = dict.fromkeys((tensor.name for tensor in file.tensors), reference.pop("most"))
    wanted |= {name: "F32" for name in wanted if name.endswith("norm.weight")}
    for made, places in reference.items():
        for part, layers in places.items():
            numbers: Iterable[int] = range(200) if layers == "all" else layers
            names = [f"blk.{number}.{part}.weight" for number in numbers] or [f"{part}.weight"]
            wanted |= {name: made for name in names if name in wanted}
    assert chosen(file, kind) == wanted
    mixed = list(file.tensors)
    random.Random(0).shuffle(mixed)
    assert chosen(Head(3, file.raw, tuple(mixed), 0), kind) == wanted  # the order in the file does not matter


@pytest.mark.parametrize(("heads", "shared", "wanted"), [(32, 8, "Q4_K"), (24, 8, "Q3_K"), (16, 0, "Q3_K")])
def test_four_queries_to_a_value_give_q2_k_more_bits(heads: int, shared: int, wanted: str) -> None:
    assert chosen(model(heads=heads, shared=shared), "q2_k")["blk.3.attn_v.weight"] == wanted


def test_head_counts_may_differ_from_layer_to_layer_and_the_first_counts() -> None:
    file = model(heads=32, shared=32)
    array = struct.pack("<IQ3I", UINT32, 3, 8, 32, 32)
    file = Head(3, file.raw | {"llama.attention.head_count_kv": (9, array)}, file.tensors, 0)
    assert chosen(file, "q2_k")["blk.3.attn_v.weight"] == "Q4_K"


def test_values_of_a_70b_model_have_more_bits() -> None:
    big = model(layers=80, heads=64, shared=8)
    assert layers_of(big, "q3_k_s", "attn_v", "Q5_K") == list(range(80))
    assert layers_of(big, "q4_k_s", "attn_v", "Q5_K") == list(range(80))
    assert layers_of(big, "q2_k", "attn_v", "Q5_K") == list(range(80))
    more = {*range(10), *range(70, 80), *range(12, 70, 3)}
    assert layers_of(big, "q4_k_m", "attn_v", "Q6_K") == sorted(more)
    assert layers_of(big, "q4_k_m", "attn_v", "Q5_K") == sorted(set(range(80)) - more)
    assert layers_of(big, "q4_k_m", "attn_k", "Q4_K") == list(range(80))
    assert layers_of(big, "q4_0", "attn_v", "Q4_0") == list(range(80))
    assert layers_of(model(layers=80, heads=64, shared=64), "q3_k_s", "attn_v", "Q5_K") == []  # 65B
    assert layers_of(model("qwen2", layers=80, heads=64, shared=64), "q3_k_s", "attn_v", "Q5_K") == list(range(80))
    assert layers_of(model("jais2", layers=68), "q3_k_s", "attn_v", "Q5_K") == list(range(68))
    assert layers_of(model("qwen3", layers=80, heads=64, shared=8), "q3_k_s", "attn_v", "Q5_K") == []


def experts(count: int, *, layers: int = 16) -> Head:
    extra = {
        "ffn_gate_inp": (1024, count),
        "ffn_down_exps": (2048, 1024, count),
        "ffn_up_exps": (1024, 2048, count),
        "ffn_down_shexp": (2048, 1024),
    }
    file = model(layers=layers, heads=32, shared=8, extra=extra, numbers={"expert_count": count})
    kept = tuple(tensor for tensor in file.tensors if not tensor.name.endswith(("ffn_down.weight", "ffn_up.weight")))
    return Head(3, file.raw, kept, 0)


@pytest.mark.parametrize("kind", MIXED)
def test_eight_experts(kind: str) -> None:
    types = chosen(experts(8), kind)
    assert types["blk.5.attn_k.weight"] == types["blk.5.attn_v.weight"] == "Q8_0"
    assert types["blk.5.ffn_gate_inp.weight"] == "F32"
    default = chosen(model(), kind)["blk.5.attn_q.weight"]
    more = kind in ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m")
    assert types["blk.5.attn_output.weight"] == ("Q5_K" if more else default)
    assert types["blk.5.ffn_up_exps.weight"] == types["blk.5.attn_q.weight"] == default


def test_with_experts_a_layer_s_number_counts() -> None:
    sixteen = [0, 1, 4, 7, 10, 13, 14, 15]
    for name in ("ffn_down_exps", "ffn_down_shexp"):
        assert layers_of(experts(128), "q4_k_m", name, "Q6_K") == sixteen
        assert layers_of(experts(8), "q4_k_m", name, "Q6_K") == sixteen
        assert layers_of(experts(128), "q4_k_s", name, "Q5_K") == [0, 1]
        assert layers_of(experts(128), "q3_k_m", name, "Q5_K") == [0]
    assert layers_of(experts(128), "q4_k_m", "attn_k", "Q4_K") == list(range(16))
    assert layers_of(experts(128), "q4_k_m", "attn_v", "Q6_K") == sixteen
    # Without experts in the metadata it is a count of tensors: two to a layer, the second half goes past the end.
    file = experts(128)
    dense = Head(3, {key: value for key, value in file.raw.items() if "expert" not in key}, file.tensors, 0)
    assert layers_of(dense, "q4_k_s", "ffn_down_exps", "Q5_K") == [0]
    assert layers_of(dense, "q5_k_m", "ffn_down_shexp", "Q6_K") == [0, 3, *range(6, 16)]
    stray = Head(3, file.raw, (*file.tensors, Tensor("blk.16.ffn_down_exps.weight", (2048, 1024, 128), 0, 0)), 0)
    with pytest.raises(StepFailed, match=r"blk\.16\.ffn_down_exps\.weight"):
        tensor_types(stray, "q4_k_m")


def test_fused_attention_counts_as_values() -> None:
    fused = model("phi3", extra={"attn_qkv": (1024, 3072)})
    fused = Head(3, fused.raw, tuple(t for t in fused.tensors if not t.name.endswith("attn_v.weight")), 0)
    assert layers_of(fused, "q4_k_m", "attn_qkv", "Q6_K") == [0, 1, 4, 7, 10, 13, 14, 15]
    assert layers_of(fused, "q4_k_m", "attn_qkv", "Q4_K") == [2, 3, 5, 6, 8, 9, 11, 12]
    assert layers_of(fused, "q3_k_m", "attn_qkv", "Q5_K") == [0, 1]
    assert layers_of(fused, "q4_k_s", "attn_qkv", "Q5_K") == [0, 1, 2, 3]
    assert layers_of(fused, "q3_k_l", "attn_qkv", "Q5_K") == list(range(16))


def test_falcon_has_rules_of_its_own() -> None:
    falcon = model("falcon")
    assert all(chosen(falcon, kind)["output.weight"] == "Q8_0" for kind in MIXED)
    assert layers_of(falcon, "q4_k_m", "ffn_down", "Q6_K") == [0]
    assert layers_of(falcon, "q4_k_m", "ffn_down", "Q5_K") == [1, 4, 7, 10, 13, 14, 15]
    assert layers_of(falcon, "q3_k_m", "ffn_down", "Q5_K") == [0]
    assert layers_of(falcon, "q3_k_m", "ffn_down", "Q4_K") == [1, 4, 7, 10, 13, 14, 15]
    assert layers_of(falcon, "q3_k_l", "ffn_down", "Q4_K") == list(range(16))
    assert layers_of(falcon, "q4_k_s", "ffn_down", "Q5_K") == []
    assert layers_of(falcon, "q3_k_l", "attn_output", "Q4_K") == list(range(16))
    assert layers_of(falcon, "q2_k", "attn_output", "Q2_K") == list(range(16))


@pytest.mark.parametrize("kind", MIXED)
def test_embeddings_that_serve_as_output(kind: str) -> None:
    default = chosen(model(), kind)["blk.5.attn_q.weight"]
    wanted = "Q8_0" if kind == "q8_0" else "Q6_K"
    tied, untied = chosen(model(tied=True), kind), chosen(model(), kind)
    assert tied["token_embd.weight"] == untied["output.weight"] == wanted
    assert untied["token_embd.weight"] == default
    assert chosen(model(tied=True, hidden=1056), kind)["token_embd.weight"] == "Q8_0"


@pytest.mark.parametrize(
    ("kind", "by_32", "odd"),
    [
        *(("q6_k", "Q8_0", "F16"), ("q5_k_s", "Q5_1", "F16"), ("q4_k_m", "Q5_0", "F16"), ("q3_k_s", "Q4_0", "F16")),
        *(("q2_k", "Q4_0", "F16"), ("q8_0", "Q8_0", "F16"), ("q4_0", "Q4_0", "F16"), ("q5_1", "Q5_1", "F16")),
        *(("f16", "F16", "F16"), ("bf16", "BF16", "BF16"), ("f32", "F32", "F32")),
    ],
)
def test_rows_that_blocks_do_not_fill(kind: str, by_32: str, odd: str) -> None:
    types = chosen(model(extra={"attn_q": (1056, 8), "ffn_up": (1000, 8)}), kind)
    assert (types["blk.5.attn_q.weight"], types["blk.5.ffn_up.weight"]) == (by_32, odd)


@pytest.mark.parametrize("kind", REFERENCE["tensors"])
def test_bytes_of_a_tensor_are_ggml_s(kind: str, tmp_path: Path) -> None:
    import gguf

    kinds = {"Q6_K": "q6_k", "Q5_K": "q5_k_s", "Q4_K": "q4_k_s", "Q3_K": "q3_k_s", "Q2_K": "q2_k"}
    file = kinds.get(kind, kind.lower())
    writer = gguf.GGUFWriter(tmp_path / "source.gguf", "llama")
    writer.add_file_type(0)
    writer.add_tensor("blk.0.attn_q.weight", WEIGHTS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = make_types(tmp_path / "source.gguf", [file], tmp_path, "x")[file]
    (tensor,) = gguf.GGUFReader(path).tensors
    assert tensor.tensor_type.name == kind
    assert hashlib.sha256(tensor.data.tobytes()).hexdigest() == REFERENCE["tensors"][kind]
    if "K" not in kind:  # which numpy cannot make
        assert np.array_equal(tensor.data, gguf.quantize(WEIGHTS, tensor.tensor_type))
    error = np.abs(gguf.dequantize(tensor.data, tensor.tensor_type) - WEIGHTS).max()
    assert error < 2.0 ** (1 - int(kind[1]))  # a step between -1 and 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A GGUF file of float32 of a random model with rows of 256, whose predictions are far from uniform."""
    root = tmp_path_factory.mktemp("tiny")
    changes = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.1, "num_hidden_layers": 3}
    tiny_tokenizer(tiny_base(root / "model", tied=False, **changes))
    converted(root / "model", root / "tiny.gguf", request.config)
    return root / "tiny.gguf"


def predictions(path: Path) -> dict[int, float]:
    """Token -> log-probability after a fixed prompt, computed by llama.cpp."""
    xllamacpp = pytest.importorskip("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = 64
    parameters.warmup = False
    request = {"prompt": [1, 65, 300, 310, 280], "max_tokens": 1, "n_probs": 320, "logit_bias": [[270, 1000]]}
    answer: Any = xllamacpp.Server(parameters).handle_completions(request | {"logprobs": 320})
    (position,) = answer["choices"][0]["logprobs"]["content"]
    return {entry["id"]: entry["logprob"] for entry in position["top_logprobs"]}


def test_llama_cpp_runs_every_type(tiny: Path, tmp_path: Path) -> None:
    exact = predictions(tiny)
    divergence: dict[str, float] = {}
    for kind, path in make_types(tiny, list(GGUF_TYPES), tmp_path, "tiny").items():
        found = predictions(path)
        assert found.keys() == exact.keys() and len(found) == 320
        divergence[kind] = sum(math.exp(p) * (p - found[token]) for token, p in exact.items())
        if kind == "q4_k_m":
            assert {tensor.type for tensor in read_head(path).tensors} == {"F32", "Q4_K", "Q6_K"}
    unlike = sum(math.exp(p) * (p - exact[(token + 1) % 320]) for token, p in exact.items())
    assert divergence["f32"] == 0 and unlike > 2.5, (divergence, unlike)
    bounds = {"f": 1e-4, "b": 1e-3, "q8": 0.01, "q6": 0.05, "q5": 0.2, "q4": 0.5, "q3": 1.0, "q2": 2.0}
    for kind, found in divergence.items():
        assert found < bounds[kind[:2] if kind[0] == "q" else kind[0]], (divergence, unlike)


def test_weights_beyond_a_scale_are_refused(tiny: Path, tmp_path: Path) -> None:
    file = read_head(tiny)
    (tensor,) = (tensor for tensor in file.tensors if tensor.name == "blk.1.ffn_down.weight")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tiny.read_bytes())
    with damaged.open("r+b") as out:
        out.seek(file.data_start + tensor.offset)
        out.write(struct.pack("<f", 1e12))
    for kind in MIXED:
        with pytest.raises(StepFailed, match=r"blk\.1\.ffn_down\.weight holds weights beyond"):
            make_types(damaged, [kind], tmp_path, "x")


@pytest.mark.real
def test_real_model_equals_llama_cpp(smollm2: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = tmp_path / "source.gguf"
    converter.convert(smollm2, source, "f32", converter_cache(request.config), name="smollm2")
    for kind in GGUF_TYPES:
        path = make_types(source, [kind], tmp_path, "smollm2")[kind]
        file, reference = read_head(path), REFERENCE["real"][kind]
        tensors = {tensor.name: tensor for tensor in file.tensors}
        with path.open("rb") as data:
            for name, wanted in reference.items():
                data.seek(file.data_start + tensors[name].offset)
                assert hashlib.sha256(data.read(tensors[name].nbytes)).hexdigest() == wanted, (kind, name)
        path.unlink()
