"""GGUF = merged: how the two are compared, and what is said of it. What the comparison finds is in test_battery."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune_assets.export.gguf.make import GgufInputs, make_gguf
from finetune_assets.export.parity.held_out import BUILT_IN, CONVERSATIONS, POINTS, pick, shares
from finetune_assets.export.parity.limits import MAX_KL, Figures, judge
from finetune_assets.export.parity.picture import draw
from finetune_assets.export.parity.prove import divergence, examine, prove, refer
from finetune_assets.machine.device import choose_device
from finetune_assets.models.engines.llama_cpp_probe import Distribution
from finetune_assets.models.formats.gguf import UINT32, read_head, write_with_head
from finetune_assets.models.loading import load_chat, suited
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.store.digests import digest_of_file
from tests.support.corruptions.files import flip
from tests.support.export_fixtures import gguf_files

pytestmark = pytest.mark.usefixtures("one_thread_each")


@pytest.fixture(scope="module")
def files(merged: Path, request: pytest.FixtureRequest) -> dict[str, Path]:
    return gguf_files(merged, ("f32", "f16", "q8_0"), request.config)


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
    assert f"check kl: mean KL divergence {figures['q8_0'].kl:.4g} nats per token, allowed: 1e-06" in str(caught.value)
    assert caught.value.message.startswith("q8_0 is too coarse for this model (tiny-q8_0.gguf):")
    assert f"top-1 agreement {figures['q8_0'].top1:.0%}" in caught.value.message
    # the value that it proposes is one that lets the file pass
    proposed = float(str(caught.value.hint).split("gguf.max_kl: {q8_0: ")[1].removesuffix("}"))
    assert figures["q8_0"].kl < proposed < 1.2 * figures["q8_0"].kl
    # all that fail are told at once
    with pytest.raises(StepFailed, match=r"tiny-f16.gguf \(f16\) is not(.|\n)*q8_0 is too coarse"):
        prove(both, merged, held_out, device=_no_device, max_kl={"q8_0": 1e-9, "f16": 1e-9}, recorded=figures)
    # what was measured before is judged again, not measured again
    with pytest.raises(StepFailed, match="check kl"):
        prove(both, merged, held_out, device=_no_device, max_kl={"q8_0": 1e-6}, recorded=figures)
    assert prove(both, merged, held_out, device=_no_device, max_kl={}, recorded=figures) == figures


def _no_device() -> Any:
    raise AssertionError("nothing has to be measured")


def test_a_file_that_changed_since_it_was_written(files: dict[str, Path], merged: Path, held_out: Path) -> None:
    with pytest.raises(StepFailed, match=r"tiny-f16.gguf \(f16\) is not the merged model:\n  check bytes: sha256 "):
        prove(
            {"f16": files["f16"]}, merged, held_out, device=lambda: choose_device(kind="cpu"), max_kl={}, recorded={},
            written={"f16": "0" * 64},
        )  # fmt: skip


def test_what_is_not_as_it_was_written_is_not_given_to_llama_cpp(
    files: dict[str, Path], merged: Path, held_out: Path, tmp_path: Path
) -> None:
    """It would end this process over a number of experts that the file has not."""
    head = read_head(files["f16"]).with_value("llama.expert_count", UINT32, 2)
    write_with_head(files["f16"], head, broken := tmp_path / "broken.gguf")
    found = examine(broken, refer(merged, held_out, choose_device(kind="cpu")), sha256=digest_of_file(files["f16"]))
    assert found[0] is None and [failure.check for failure in found[1]] == ["bytes"]


def test_no_file_at_all(merged: Path, held_out: Path, tmp_path: Path) -> None:
    figures, failures = examine(tmp_path / "none.gguf", refer(merged, held_out, choose_device(kind="cpu")), sha256="0")
    assert figures is None and [failure.check for failure in failures] == ["file"]


def test_without_held_out_rows_words_of_our_own_are_compared(
    files: dict[str, Path], merged: Path, tmp_path: Path
) -> None:
    (tmp_path / "test.jsonl").write_text("")
    reference = refer(merged, tmp_path / "test.jsonl", choose_device(kind="cpu"))
    assert len(reference.prompts) == len(BUILT_IN)
    figures, failures = examine(files["f16"], reference)
    assert figures is not None and not failures


def test_rows_longer_than_the_context(files: dict[str, Path], merged: Path, tmp_path: Path) -> None:
    short = Path(shutil.copytree(merged, tmp_path / "short"))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    head = read_head(files["f16"]).with_value("llama.context_length", UINT32, 64)
    write_with_head(files["f16"], head, file := tmp_path / "short.gguf")
    answer = {"role": "assistant", "content": "hello you, " * 50}
    row = {"id": "0", "dataset": "x", "messages": [{"role": "user", "content": "a?"}, answer]}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    reference = refer(short, tmp_path / "test.jsonl", choose_device(kind="cpu"))
    figures, failures = examine(file, reference)
    assert failures == [] and figures is not None and figures.points == len(reference.points) > 8


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
    types = {kind: (10**9 // (place + 1), 10.0 ** (place - 17)) for place, kind in enumerate(MAX_KL)}
    for name in ("a.png", "b.png"):
        draw(tmp_path / name, types | {"f32": (10**9, 0.0)})
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) < 100_000
    assert content == (tmp_path / "b.png").read_bytes()


def test_every_type_has_a_limit_and_rounder_types_have_wider_ones() -> None:
    from finetune_assets.recipe import GGUF_TYPES

    assert list(MAX_KL) == list(GGUF_TYPES)
    limits = [limit for kind, limit in MAX_KL.items()]
    assert limits == sorted(limits)


def test_a_file_that_went_bad_unnoticed_is_made_again(merged: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """Its size and time are as they were, so that nobody has read it since."""
    kept = {kind: (files[kind], digest_of_file(files[kind])) for kind in ("f32", "f16", "q8_0")}
    flip(bad := Path(shutil.copyfile(files["f16"], tmp_path / "bad.gguf")))
    (out := tmp_path / "out").mkdir()
    inputs = GgufInputs(
        merged, ["f16", "q8_0"], out, name="tiny", about={}, cache=tmp_path / "none",
        kept=kept | {"f16": (bad, kept["f16"][1])},
    )  # fmt: skip
    made = make_gguf(inputs, lambda event: None)
    assert {kind: facts["sha256"] for kind, facts in made.items()} == {kind: kept[kind][1] for kind in made}
    assert {path.name: path.samefile(files["q8_0"]) for path in out.iterdir()} == {
        "tiny-f16.gguf": False,
        "tiny-q8_0.gguf": True,
    }
    assert (out / "tiny-f16.gguf").read_bytes() == files["f16"].read_bytes()


def test_what_is_made_and_measured_again_when() -> None:
    from finetune_assets.assets.gguf_file import _kept, _recorded
    from finetune_assets.store.artifact import Artifact

    made = {
        "asset": "gguf_file",
        "code_version": "2",
        "recipe": {"gguf.types": ["q8_0"]},
        "sources": {},
        "upstreams": {"merged_model": "m", "dataset_info/test": "d"},
        "tools": {"converter": "c", "xllamacpp": "x"},
    }
    figures = Figures(kl=0.004, top1=0.95, ppl_ratio=1.01, tokens_per_second=9.0, points=64, reference="fp32")
    entry = {"file": "tiny-q8_0.gguf", "bytes": 1, **dataclasses.asdict(figures)}
    held = {"tiny-q8_0.gguf": {"size": 1, "sha256": "0" * 64}}
    previous = Artifact(Path("/made"), {"ingredients": made, "metrics": {"types": {"q8_0": entry}}, "files": held})
    files = {"q8_0": (Path("/made/tiny-q8_0.gguf"), "0" * 64)}

    def again(**changes: dict[str, Any] | str) -> tuple[bool, bool]:
        """Whether the file is made again, and whether it is measured again."""
        wanted = made | {
            key: {**made[key], **change} if isinstance(change, dict) else change for key, change in changes.items()
        }
        assert _kept(previous, wanted) in ({}, files) and _recorded(previous, wanted) in ({}, {"q8_0": figures})
        return not _kept(previous, wanted), not _recorded(previous, wanted)

    assert again() == (False, False)
    assert again(recipe={"gguf.types": ["q8_0", "f16"], "gguf.max_kl": {"q8_0": 0.1}}) == (False, False)
    assert again(upstreams={"dataset_info/test": "other"}) == (False, True)
    assert again(tools={"xllamacpp": "other"}) == (True, True)
    assert again(tools={"converter": "other"}) == (True, True)
    assert again(upstreams={"merged_model": "other"}) == (True, True)
    assert again(code_version="3") == (True, True)
    assert (_kept(None, made), _recorded(None, made)) == ({}, {})
