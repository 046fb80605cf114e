"""GGUF = merged, proven: good files pass every check, and each way of being wrong is caught by the check for it."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune_assets.chat.decoding import load_chat
from finetune_assets.device import choose_device
from finetune_assets.errors import StepFailed
from finetune_assets.export import parity
from finetune_assets.export.converter import convert
from finetune_assets.export.gguf_file import BOOL, STRING, UINT32, Head, read_head, write_with_head
from finetune_assets.export.held_out import BUILT_IN, CONVERSATIONS, POINTS, pick, shares, suited
from finetune_assets.export.parity import Figures, Reference, divergence, examine, judge, prove, refer
from finetune_assets.export.parity_picture import draw
from finetune_assets.export.probe import Distribution
from finetune_assets.export.quantise import make_types
from tests.export_fixtures import CHATML, converter_cache, tiny_base, tiny_tokenizer

TYPES = ("f32", "f16", "q8_0", "q4_k_m")
FLOAT32 = 6
# The tokenizer's begin-of-text token is ChatML's opening: without it, one at the start is one too many.
CHAT = CHATML.replace("<|im_start|>", "")
WORDS = ("hello you", "a small, quiet house", "no man is an island", "the end of it all!", "中文 and more")


@pytest.fixture(scope="module", autouse=True)
def one_llama_cpp_thread(one_thread: None) -> Iterator[None]:
    """llama.cpp's threads wait for one another by spinning."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune_assets.chat.engines._cores", lambda: 1)
        yield


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "test.jsonl"
    turns = [({"role": "user", "content": f"{words}?"}, {"role": "assistant", "content": words}) for words in WORDS]
    rows = [{"id": f"{number:016x}", "dataset": "x", "messages": pair} for number, pair in enumerate(turns)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that has opinions.

    As initialised, all of its distributions are flat and attention is a mean, so that nothing that happens to a weight
    shows. Weights four times as large give logits a spread of several nats and make heads look somewhere, and rows of
    256 take K-quants.
    """
    shape = {"hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.08, "rope_theta": 5000.0}
    folder = tiny_base(tmp_path_factory.mktemp("model") / "merged", tied=False, **shape)
    tiny_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    chat = {"template": CHAT, "default_system": None, "stop_token_ids": [2], "stop": ["<|im_end|>"]}
    (folder / "chat.json").write_text(json.dumps(chat))
    return folder


@pytest.fixture(scope="module")
def files(merged: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    convert(merged, folder / "tiny-f32.gguf", "f32", converter_cache(request.config), name="tiny")
    make_types(folder / "tiny-f32.gguf", list(TYPES[1:]), folder, "tiny")
    return {kind: folder / f"tiny-{kind}.gguf" for kind in TYPES}


@pytest.fixture(scope="module")
def reference(merged: Path, held_out: Path) -> Reference:
    return refer(merged, held_out, choose_device(kind="cpu"))


def findings(kind: str, file: Path, reference: Reference) -> tuple[Figures | None, set[str]]:
    """The figures, and the names of the checks that the file does not pass."""
    figures, failures = examine(file, reference)
    found = [*failures, *(judge(kind, figures, {}) if figures else [])]
    return figures, {failure.check for failure in found}


@pytest.mark.parametrize("kind", TYPES)
def test_good_files_pass_every_check(kind: str, files: dict[str, Path], reference: Reference) -> None:
    figures, failed = findings(kind, files[kind], reference)
    assert failed == set()
    assert figures is not None and figures.points == POINTS
    assert 0.9 < figures.ppl_ratio < 1.1
    assert figures.kl < {"f32": 1e-4, "f16": 1e-4, "q8_0": 0.01, "q4_k_m": 0.2}[kind], "limits have room"


Rows = dict[str, np.ndarray]


def rows_of(head: Head, file: Path) -> Rows:
    """Each tensor's rows as bytes, writable into the file."""
    data = np.memmap(file, dtype=np.uint8, mode="r+")
    return {
        tensor.name: data[head.data_start + tensor.offset :][: tensor.nbytes].reshape(
            -1, tensor.nbytes * tensor.shape[0] // tensor.elements
        )
        for tensor in head.tensors
    }


def zeroed(rows: Rows) -> None:
    rows["blk.1.ffn_down.weight"][:] = 0


def swapped(rows: Rows) -> None:
    one, two = rows["blk.0.attn_q.weight"], rows["blk.0.attn_output.weight"]
    one[:], two[:] = two.copy(), one.copy()


def unpermuted(rows: Rows) -> None:
    """Q and K as Hugging Face has them: halves of a head's rotation one after the other, not in turn."""
    for name, heads in (("attn_q", 4), ("attn_k", 2)):
        matrix = rows[f"blk.0.{name}.weight"]
        split = matrix.reshape(heads, len(matrix) // heads // 2, 2, -1)
        matrix[:] = split.swapaxes(1, 2).reshape(matrix.shape).copy()


def scaled(rows: Rows) -> None:
    norm = rows["blk.1.attn_norm.weight"].view(np.float32)
    norm *= 3


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("harm", [zeroed, swapped, unpermuted, scaled])
def test_wrong_weights_are_caught_in_every_type(
    kind: str, harm: Callable[[Rows], None], files: dict[str, Path], reference: Reference, tmp_path: Path
) -> None:
    broken = Path(shutil.copyfile(files[kind], tmp_path / "broken.gguf"))
    harm(rows_of(read_head(broken), broken))
    figures, failed = findings(kind, broken, reference)
    assert figures is not None and math.isfinite(figures.kl)
    assert failed == {"kl", "weights"}


def with_text(head: Head, key: str, text: str) -> Head:
    data = text.encode()
    return Head(head.version, head.raw | {key: (STRING, struct.pack("<Q", len(data)) + data)}, head.tensors, 0)


def with_float(head: Head, key: str, value: float) -> Head:
    return Head(head.version, head.raw | {key: (FLOAT32, struct.pack("<f", value))}, head.tensors, 0)


def without(head: Head, key: str) -> Head:
    raw = {name: value for name, value in head.raw.items() if name != key}
    return Head(head.version, raw, head.tensors, 0)


TEMPLATE = "tokenizer.chat_template"
WRONG_HEADS: dict[str, tuple[Callable[[Head], Head], set[str]]] = {
    # after the answer's header: another prompt, too
    "template with a newline more": (
        lambda head: with_text(head, TEMPLATE, CHAT.replace("assistant\n'", "assistant\n\n'")),
        {"chat template", "prompt ids"},
    ),
    # behind the last tag, where Jinja drops it: the same prompts, and still not the text that was trained with
    "template with a newline at its end": (
        lambda head: with_text(head, TEMPLATE, CHAT + "\n"), {"chat template"}
    ),
    # llama.cpp then takes ChatML
    "no template": (lambda head: without(head, TEMPLATE), {"chat template", "begin of text", "prompt ids"}),
    "wrong eos": (lambda head: head.with_value("tokenizer.ggml.eos_token_id", UINT32, 300), {"stop tokens"}),
    "wrong rope base": (lambda head: with_float(head, "llama.rope.freq_base", 10000.0), {"rope base", "kl"}),
    "no rope base": (lambda head: without(head, "llama.rope.freq_base"), {"rope base", "kl"}),
    "begin of text added": (
        lambda head: head.with_value("tokenizer.ggml.add_bos_token", BOOL, True), {"begin of text", "prompt ids"}
    ),
    "short context": (lambda head: head.with_value("llama.context_length", UINT32, 1024), {"context length"}),
    "other epsilon": (
        lambda head: with_float(head, "llama.attention.layer_norm_rms_epsilon", 0.5), {"dimensions", "kl"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_HEADS)
@pytest.mark.parametrize("kind", ["f32", "q4_k_m"])
def test_wrong_heads_are_caught_by_name(
    name: str, kind: str, files: dict[str, Path], reference: Reference, tmp_path: Path
) -> None:
    harm, expected = WRONG_HEADS[name]
    head = read_head(files[kind])
    changed = harm(head)
    assert changed.raw != head.raw
    write_with_head(files[kind], changed, tmp_path / "broken.gguf")
    _, failed = findings(kind, tmp_path / "broken.gguf", reference)
    # Coarse rounding may drown what a rope base does to distributions, but not what the head says.
    assert failed == expected or (kind != "f32" and failed == expected - {"kl"})


def test_a_file_cut_short_a_tensor_less_and_no_file_at_all(
    files: dict[str, Path], reference: Reference, tmp_path: Path
) -> None:
    content = files["f16"].read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: len(content) * 9 // 10])
    figures, failures = examine(tmp_path / "cut.gguf", reference)
    assert figures is None
    assert [failure.check for failure in failures] == ["file"] and "cut short" in failures[0].measured
    head = read_head(files["f16"])
    fewer = Head(head.version, head.raw, tuple(t for t in head.tensors if t.name != "blk.1.ffn_up.weight"), 0)
    write_with_head(files["f16"], fewer, tmp_path / "fewer.gguf")
    figures, failures = examine(tmp_path / "fewer.gguf", reference)
    assert figures is None
    assert [failure.check for failure in failures] == ["tensors", "file"], "llama.cpp cannot load it either"
    assert "no blk.1.ffn_up.weight" in failures[0].measured
    assert examine(tmp_path / "none.gguf", reference)[0] is None


def test_a_failure_names_type_check_and_limit(files: dict[str, Path], merged: Path, held_out: Path) -> None:
    def cpu() -> Any:
        return choose_device(kind="cpu")

    both = {kind: files[kind] for kind in ("f16", "q8_0")}
    figures = prove(both, merged, held_out, device=cpu, max_kl={}, recorded={})
    assert list(figures) == ["f16", "q8_0"]
    assert figures["f16"].kl < figures["q8_0"].kl
    assert math.isfinite(figures["f16"].tokens_per_second)
    with pytest.raises(StepFailed) as caught:
        prove(both, merged, held_out, device=cpu, max_kl={"q8_0": 1e-6}, recorded={})
    assert "tiny-q8_0.gguf (q8_0)" in caught.value.message
    assert f"check kl: mean KL divergence {figures['q8_0'].kl:.4g} nats per token, allowed: 1e-06" in str(caught.value)
    assert "gguf.max_kl: {q8_0: ...}" in str(caught.value.hint)
    # what was measured before is judged again, not measured again
    with pytest.raises(StepFailed, match="check kl"):
        prove(both, merged, held_out, device=_no_device, max_kl={"q8_0": 1e-6}, recorded=figures)
    assert prove(both, merged, held_out, device=_no_device, max_kl={}, recorded=figures) == figures


def _no_device() -> Any:
    raise AssertionError("nothing has to be measured")


def test_without_held_out_rows_words_of_our_own_are_compared(
    files: dict[str, Path], merged: Path, tmp_path: Path
) -> None:
    (tmp_path / "test.jsonl").write_text("")
    reference = refer(merged, tmp_path / "test.jsonl", choose_device(kind="cpu"))
    assert len(reference.prompts) == len(BUILT_IN)
    figures, failures = examine(files["f16"], reference)
    assert figures is not None and not failures


def test_points_are_chosen_by_content(merged: Path, held_out: Path) -> None:
    chat = load_chat(merged)
    rows = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    chosen = pick(rows, chat, CONVERSATIONS, POINTS, 512)
    assert chosen == pick(rows[::-1], chat, CONVERSATIONS, POINTS, 512)
    assert sum(len(conversation.points) for conversation in chosen) == POINTS
    for conversation in chosen:
        (prompt, ids), text = conversation.prompt, chat.tokenizer.decode(conversation.ids)
        assert prompt[-1]["role"] == "user" and conversation.ids[: len(ids)] == ids
        assert all(at >= len(ids) for at in conversation.places), text
        assert conversation.places == sorted(set(conversation.places))
    many = [{"id": f"{number:03}", "messages": rows[0]["messages"]} for number in range(40)]
    assert len(pick(many, chat, CONVERSATIONS, POINTS, 512)) == CONVERSATIONS


def test_shares() -> None:
    assert shares([100, 100], 64) == [32, 32]
    assert shares([5, 100, 100], 64) == [5, 29, 30]
    assert shares([3, 2], 64) == [3, 2]
    assert sum(shares([20] * 7, 64)) == 64
    assert shares([], 64) == []


def test_divergence_is_that_of_the_textbook() -> None:
    generator = np.random.default_rng(0)
    p, q = (generator.dirichlet(np.full(50, 0.3)) + 1e-6 for _ in range(2))
    p, q = p / p.sum(), q / q.sum()
    order = np.argsort(-q)
    exact = float(np.sum(p * np.log(p / q)))
    whole = divergence(np.log(p), Distribution(order, np.log(q[order])))
    assert whole == pytest.approx(exact, rel=1e-9)
    part = divergence(np.log(p), Distribution(order[:20], np.log(q[order[:20]])))
    grouped = np.append(p[order[:20]], p[order[20:]].sum()), np.append(q[order[:20]], q[order[20:]].sum())
    assert part == pytest.approx(float(np.sum(grouped[0] * np.log(grouped[0] / grouped[1]))), rel=1e-6)
    assert 0 < part <= whole
    assert divergence(np.log(p), Distribution(order, np.log(p[order]))) == pytest.approx(0, abs=1e-12)
    impossible = np.log(q[order])
    impossible[order == p.argmax()] = -math.inf
    assert 1 < divergence(np.log(p), Distribution(order, impossible)) < math.inf
    assert divergence(np.log(p), Distribution(order, np.full(50, math.nan))) == math.inf
    assert judge("q2_k", Figures(math.inf, 0, 1, 1, 64, "fp32"), {})


def test_a_merged_model_too_large_for_float32_is_computed_as_it_is_stored(merged: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    device = choose_device(kind="cpu")
    assert suited(device, merged).precision == "fp32"
    weights = load_file(merged / "model.safetensors")
    halves = {name: tensor.bfloat16() for name, tensor in weights.items()} | {"model.norm.weight": torch.ones(256)}
    save_file(halves, tmp_path / "model.safetensors")
    assert suited(device, tmp_path).precision == "fp32"
    need = sum(tensor.numel() for tensor in weights.values()) * 4 / 2**30
    assert suited(dataclasses.replace(device, memory_gib=need), tmp_path).precision == "bf16"


def test_the_picture_is_small_and_the_same_every_time(tmp_path: Path) -> None:
    types = {kind: (10**9 // (place + 1), 10.0 ** (place - 17)) for place, kind in enumerate(parity.MAX_KL)}
    for name in ("a.png", "b.png"):
        draw(tmp_path / name, types | {"f32": (10**9, 0.0)})
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) < 100_000
    assert content == (tmp_path / "b.png").read_bytes()


def test_every_type_has_a_limit_and_rounder_types_have_wider_ones() -> None:
    from finetune_assets.recipe import GGUF_TYPES

    assert list(parity.MAX_KL) == list(GGUF_TYPES)
    limits = [limit for kind, limit in parity.MAX_KL.items()]
    assert limits == sorted(limits)


def test_what_is_made_and_measured_again_when() -> None:
    from finetune_assets.artifacts import Artifact
    from finetune_assets.assets.gguf_file import _kept, _recorded

    made = {
        "asset": "gguf_file",
        "code_version": "2",
        "recipe": {"gguf.types": ["q8_0"]},
        "sources": {},
        "upstreams": {"merged_model": "m", "dataset_info/test": "d"},
        "tools": {"converter": "c", "libgguf": "l", "xllamacpp": "x"},
    }
    figures = Figures(kl=0.004, top1=0.95, ppl_ratio=1.01, tokens_per_second=9.0, points=64, reference="fp32")
    entry = {"file": "tiny-q8_0.gguf", "bytes": 1, **dataclasses.asdict(figures)}
    previous = Artifact(Path("/made"), {"ingredients": made, "metrics": {"types": {"q8_0": entry}}})
    files = {"q8_0": Path("/made/tiny-q8_0.gguf")}

    def again(**changes: dict[str, Any] | str) -> tuple[bool, bool]:
        """Whether the file is made again, and whether it is measured again."""
        wanted = made | {
            key: {**made[key], **change} if isinstance(change, dict) else change for key, change in changes.items()
        }
        assert _kept(previous, wanted) in ({}, files) and _recorded(previous, wanted) in (
            {},
            {"q8_0": dataclasses.asdict(figures)},
        )
        return not _kept(previous, wanted), not _recorded(previous, wanted)

    assert again() == (False, False)
    assert again(recipe={"gguf.types": ["q8_0", "f16"], "gguf.max_kl": {"q8_0": 0.1}}) == (False, False)
    assert again(upstreams={"dataset_info/test": "other"}) == (False, True)
    assert again(tools={"xllamacpp": "other"}) == (False, True)
    assert again(tools={"libgguf": "other"}) == (True, True)
    assert again(upstreams={"merged_model": "other"}) == (True, True)
    assert again(code_version="3") == (True, True)
    assert (_kept(None, made), _recorded(None, made)) == ({}, {})
