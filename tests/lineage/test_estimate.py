"""Estimates: from past runs if there are any, from what is on disk, and never guessed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.cli.tables import plan_total
from finetune_assets.export.gguf.type_policy import tensor_types
from finetune_assets.lineage.cost import Cost
from finetune_assets.lineage.estimate import Total, costs, total
from finetune_assets.lineage.materialise import Step
from finetune_assets.lineage.nodes.base_model import weights_of
from finetune_assets.lineage.nodes.raw_dataset import count_rows
from finetune_assets.lineage.plan import make_plan
from finetune_assets.machine.disk import free_bytes
from finetune_assets.models.formats.gguf import Tensor
from finetune_assets.recipe import GGUF_TYPES
from finetune_assets.recipe.file import load_recipe
from finetune_assets.recipe.gguf_types import TYPES
from finetune_assets.store.artifact import Artifact, Made
from tests.cli.test_cli import finetune
from tests.conftest import MiniProject, rows
from tests.export.gguf.test_type_policy import head
from tests.support.history_fixtures import BODIES, make_chain, plan_of, store_of

pytestmark = pytest.mark.fast

ELEMENTS = 64 * 64
COMPANIONS = 1000  # bytes of a base model beside its weights


def write_base(folder: Path, layers: int = 1) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({f"layer.{n}": np.ones((64, 64), np.float32) for n in range(layers)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("x" * COMPANIONS)


def base_model(step: Step) -> Made:
    write_base(step.staging, 4 if step.recipe.name == "large" else 1)
    return Made({})


@pytest.fixture
def made(mini: MiniProject, monkeypatch: pytest.MonkeyPatch) -> dict[str, Artifact]:
    """A chain, with the metrics that real steps would have recorded."""
    monkeypatch.setitem(BODIES, "base_model", base_model)
    chain = make_chain(mini)
    note(chain["lora_adapter"], 100.0, rows=10, epochs=2.0, seconds=90.0)
    note(chain["eval_metrics"], 60.0, answered=2, max_new_tokens=4)
    note(chain["merged_model"], 8.0)
    note(chain["gguf_file"], 30.0)  # two types
    return chain


def note(artifact: Artifact, took: float, **metrics: Any) -> None:
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    manifest |= {"seconds": took, "metrics": manifest["metrics"] | metrics}
    (artifact.path / "manifest.json").write_text(json.dumps(manifest))


def costs_of(mini: MiniProject, name: str = "mini") -> dict[str, Cost]:
    recipe, store = load_recipe(mini.recipe_path(name)), store_of(mini)
    return costs(recipe, mini, make_plan(recipe, mini, store), store)


def test_nothing_to_do_costs_nothing(mini: MiniProject, made: dict[str, Artifact]):
    assert costs_of(mini) == {}
    assert total({}, {}) == Total(0, 0, 0, 0, 0, (), ())
    done = finetune(mini, "plan", "mini")
    assert done.returncode == 0 and "free" not in done.stdout and "~" not in done.stdout
    assert {
        (item["seconds"], item["bytes"]) for item in json.loads(finetune(mini, "plan", "mini", "--json").stdout)
    } == {(0, 0)}


@pytest.mark.parametrize(
    ("train", "seconds"),
    [
        ({"learning_rate": 0.5}, 10 + 90 * 2 * 4 / 20),  # two steps of four rows, after 20 rows in 90 s
        ({"max_steps": 20}, 10 + 90 * 20 * 4 / 20),
        ({"max_steps": 20, "gradient_accumulation_steps": 2}, 10 + 90 * 20 * 8 / 20),
        ({"max_steps": None, "num_train_epochs": 4}, 10 + 90 * 10 * 4 / 20),
    ],
)
def test_training_goes_by_the_rows_seen(
    mini: MiniProject, made: dict[str, Artifact], train: dict[str, Any], seconds: float
):
    mini.edit(train=train)
    cost = costs_of(mini)["lora_adapter"]
    assert cost.seconds == pytest.approx(seconds)
    assert cost.bytes == made["lora_adapter"].size


def test_rows_that_are_to_come_are_counted(mini: MiniProject, made: dict[str, Artifact]):
    mini.edit(train={"max_steps": None, "num_train_epochs": 2})
    mini.write_rows(rows(22))
    found = costs_of(mini)
    assert found["lora_adapter"].seconds == pytest.approx(10 + 90 * 20 * 2 / 20), "two of 22 rows are for the test"
    assert found["dataset_info"].bytes == pytest.approx(made["dataset_info"].size * 22 / 12, abs=1)
    assert found["raw_dataset"].bytes == (mini.root / "data" / "facts.json").stat().st_size
    mini.edit(dataset={"max_samples": 7})
    assert costs_of(mini)["lora_adapter"].seconds == pytest.approx(10 + 90 * 5 * 2 / 20)


def test_answers_go_by_rows_and_tokens(mini: MiniProject, made: dict[str, Artifact]):
    mini.edit(evaluate={"max_new_tokens": 12})
    assert costs_of(mini) == {"eval_metrics": Cost(60.0 * 3, made["eval_metrics"].size)}
    mini.edit(evaluate={"max_samples": 1})
    assert costs_of(mini)["eval_metrics"].seconds == pytest.approx(60.0 * 3 / 2)


def test_adapters_go_by_their_rank(mini: MiniProject, made: dict[str, Artifact]):
    manifest = json.loads((made["lora_adapter"].path / "manifest.json").read_text())
    manifest["files"] |= {"adapter_model.safetensors": {"size": 5000, "sha256": "0" * 64}}
    (made["lora_adapter"].path / "manifest.json").write_text(json.dumps(manifest))
    mini.edit(train={"lora_rank": 24})
    assert costs_of(mini)["lora_adapter"].bytes == made["lora_adapter"].size + 3 * 5000


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_the_merged_model_goes_by_its_dtype(mini: MiniProject, made: dict[str, Artifact], dtype: str, size: int):
    mini.edit(export={"export_dtype": dtype})
    cost = costs_of(mini)["merged_model"]
    head = made["base_model"].size - COMPANIONS - 4 * ELEMENTS
    assert cost == Cost(8.0, size * ELEMENTS + COMPANIONS + head)


def test_only_the_types_that_are_missing(mini: MiniProject, made: dict[str, Artifact]):
    mini.edit(gguf={"types": ["f16", "q8_0", "q4_k_m"]})
    q4 = round(ELEMENTS * 4.89 / 8)
    scratch = 4 * ELEMENTS  # converted in float32 first
    assert costs_of(mini)["gguf_file"] == Cost(20.0, q4, scratch)
    mini.edit(gguf={"types": ["f32", "q4_k_m"]})
    assert costs_of(mini)["gguf_file"] == Cost(30.0, q4 + 4 * ELEMENTS), "f32 is what the others are made from"
    mini.edit(gguf={"types": ["f16", "q8_0", "q4_k_m"]}, train={"learning_rate": 0.5})
    sizes = sum(entry["bytes"] for entry in made["gguf_file"].metrics["types"].values())
    assert costs_of(mini)["gguf_file"] == Cost(40.0, q4 + sizes, scratch), "another model: nothing is kept"


def test_files_that_are_kept_and_compared_again(mini: MiniProject, made: dict[str, Artifact]):
    manifest = json.loads((made["gguf_file"].path / "manifest.json").read_text())
    manifest["ingredients"]["upstreams"]["dataset_info/test"] = "earlier rows"
    folder = made["gguf_file"].path.with_name("e" * 20)
    made["gguf_file"].path.rename(folder)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": folder.name}))
    (folder.parent / "CURRENT").write_text(folder.name)
    assert costs_of(mini)["gguf_file"] == Cost(30.0, 0)


def test_a_type_that_is_wanted_no_longer_takes_nothing(mini: MiniProject, made: dict[str, Artifact]):
    mini.edit(gguf={"types": ["f16"]})
    assert costs_of(mini)["gguf_file"] == Cost(0.0, 0)


def test_another_recipe_goes_by_the_size_of_its_base(mini: MiniProject, made: dict[str, Artifact]):
    """It has never run: half of the facts are in the store, the other half in the folder of its model."""
    mini.recipe_path("large").write_text(mini.recipe_path().read_text())
    mini.edit("large", model={"model_name_or_path": "./large"})
    (mini.root / "large").mkdir()
    write_base(mini.root / "large", layers=4)
    (mini.root / "large" / "config.json").write_text("{}")
    found = costs_of(mini, "large")
    size = sum(path.stat().st_size for path in (mini.root / "large").iterdir())
    scale = size / made["base_model"].size
    assert found["base_model"] == Cost(None, size)
    assert found["lora_adapter"].seconds == pytest.approx((10 + 90 * 8 / 20) * scale)
    assert found["merged_model"].seconds == pytest.approx(8.0 * scale) and found["merged_model"].bytes == size
    assert 3 < scale < 5
    make_chain(mini, "large")
    note(store_of(mini).published("large", "lora_adapter")[0], 1.0, rows=10, epochs=1.0, seconds=0.0)
    mini.edit("large", train={"learning_rate": 0.5})
    assert costs_of(mini, "large")["lora_adapter"].seconds == 1.0, "its own past comes first"


def test_what_nobody_knows(mini: MiniProject, made: dict[str, Artifact]):
    mini.edit(model={"model_name_or_path": "somebody/a-model"})
    found = costs_of(mini)
    unknown = Cost(None, None)
    assert {found[name] for name in ("base_model", "lora_adapter", "eval_metrics", "merged_model", "gguf_file")} == {
        unknown
    }, "it was made of another base, and of this one nothing is here"
    shutil.rmtree(mini.store)
    first = costs_of(mini)
    assert {cost.seconds for cost in first.values()} == {None}
    assert first["raw_dataset"].bytes == (mini.root / "data" / "facts.json").stat().st_size


def test_a_step_that_does_something_else_now(mini: MiniProject, made: dict[str, Artifact]):
    manifest = json.loads((made["merged_model"].path / "manifest.json").read_text())
    manifest["ingredients"]["code_version"] = "0"
    (made["merged_model"].path / "manifest.json").write_text(json.dumps(manifest))
    mini.edit(export={"export_size": 1})
    cost = costs_of(mini)["merged_model"]
    assert cost.seconds is None and cost.bytes == made["base_model"].size


def test_the_weights_of_an_ollama_model(mini: MiniProject, made: dict[str, Artifact]):
    mini.edit(ollama={"system": "Be brief."})
    size = costs_of(mini)["ollama_model"].bytes
    assert size is not None and size < 5000, "our own store links them"
    note(made["ollama_model"], 1.0, where="server")
    weights = made["gguf_file"].metrics["types"]["f16"]["bytes"]
    assert costs_of(mini)["ollama_model"] == Cost(1.0, size + weights), "a server copies them"


def test_the_total_tells_what_will_run_from_what_may(mini: MiniProject, made: dict[str, Artifact]):
    mini.edit(train={"learning_rate": 0.5})
    plan, found = plan_of(mini), costs_of(mini)
    assert {plan[name].state for name in found} == {"stale", "maybe"}
    whole = total(plan, found)
    assert whole.seconds == pytest.approx(46) and whole.bytes == made["lora_adapter"].size
    assert whole.seconds_at_most == pytest.approx(46 + 60 + 8 + 30, abs=2)
    assert whole.bytes_at_most == sum(cost.bytes or 0 for cost in found.values())
    done = finetune(mini, "plan", "mini")
    assert "lora_adapter  stale  ~ 46.0 s, " in done.stdout
    assert "eval_metrics  maybe  up to 1 min 00 s, " in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith("a run takes about 46.0 s (up to 2 min 24 s), writes about ") and last.endswith(" are free")


@pytest.mark.parametrize(
    ("whole", "free", "lines"),
    [
        (Total(207, 207, 20_000_000, 20_000_000, 0, (), ()), 48 * 10**9,
         ["a run takes about 3 min 27 s, writes about 20.0 MB; 48.0 GB are free"]),
        (Total(207, 260, 10**9, 2 * 10**9, 0, ("gguf_file",), ("gguf_file",)), 48 * 10**9,
         ["a run takes about 3 min 27 s (up to 4 min 20 s), not counting gguf_file (no earlier run to estimate from), "
          "writes at least 1.0 GB (up to 2.0 GB); 48.0 GB are free"]),
        (Total(0, 0, 5000, 5000, 0, ("base_model",), ()), 48 * 10**9,
         ["how long a run takes is unknown (no earlier run to estimate from), writes about 5.0 kB; 48.0 GB are free"]),
        (Total(1, 1, 10**9, 2 * 10**9, 3 * 10**9, (), ()), 4 * 10**9,
         ["a run takes about 1.0 s, writes about 1.0 GB (up to 2.0 GB); 4.0 GB are free",
          "not enough disk space: 5.0 GB may be needed, 4.0 GB are free; finetune gc removes unneeded artifacts"]),
    ],
)  # fmt: skip
def test_the_last_line(whole: Total, free: int, lines: list[str]):
    assert [line.plain for line in plan_total(whole, free)] == lines


def test_bits_are_those_of_our_own_files():
    """A Llama of 8B, laid out tensor by tensor, has the size that the table says."""
    hidden, ffn, shared, words, layers = 4096, 14336, 1024, 128256, 32
    matrices = {
        **{"attn_q": (hidden, hidden), "attn_k": (hidden, shared), "attn_v": (hidden, shared)},
        **{"attn_output": (hidden, hidden), "ffn_gate": (hidden, ffn), "ffn_up": (hidden, ffn)},
        **{"ffn_down": (ffn, hidden), "attn_norm": (hidden,), "ffn_norm": (hidden,)},
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (hidden, words), "output.weight": (hidden, words)}
    shapes |= {f"blk.{n}.{name}.weight": shape for n in range(layers) for name, shape in matrices.items()}
    numbers = {"block_count": layers, "attention__head_count": 32, "attention__head_count_kv": 8}
    file = head("llama", shapes, **numbers)
    assert set(TYPES) == set(GGUF_TYPES)
    for kind, row in TYPES.items():
        sizes = [tensor.nbytes for tensor in file.with_tensors(tensor_types(file, kind)).tensors]
        assert 8 * sum(sizes) / file.parameters == pytest.approx(row.bits, abs=0.006), kind
    assert isinstance(file.tensors[0], Tensor)


def test_rows_are_counted_without_parsing(tmp_path: Path):
    tricky = [{"instruction": 'say "output": twice', "output": "\"output\" 'output'"}, {"output": ""}]
    for dump in (json.dumps(tricky), json.dumps(tricky, indent=3), "\n".join(map(json.dumps, tricky))):
        (tmp_path / "rows.json").write_text(dump)
        assert count_rows(tmp_path / "rows.json", "output") == 2
    (tmp_path / "rows.json").write_text(json.dumps([{"答案": "是"}] * 3, ensure_ascii=False))
    assert count_rows(tmp_path / "rows.json", "答案") == 3


def test_damaged_weights_weigh_nothing(tmp_path: Path):
    assert not weights_of(tmp_path)
    for content in (b"", b"\x08", b"\x02\0\0\0\0\0\0\0[]", b"\xff" * 64, b'\x0b\0\0\0\0\0\0\0{"a": null}'):
        (tmp_path / "model.safetensors").write_bytes(content)
        assert not weights_of(tmp_path)


def test_the_disk_of_a_store_that_is_not_there_yet(tmp_path: Path):
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
