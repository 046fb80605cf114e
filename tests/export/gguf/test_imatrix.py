"""The importance matrix: whose inputs are counted, and what is written."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_assets.export.gguf import imatrix, imatrix_file
from finetune_assets.export.gguf.imatrix_file import Inputs
from finetune_assets.export.gguf.quantise import make_types
from finetune_assets.machine.device import Device
from finetune_assets.models.formats.gguf import read_head
from finetune_assets.models.loading import Chat, load_chat, load_model
from finetune_assets.recipe.file import load_recipe
from finetune_assets.reporting.errors import BadInput, StepFailed
from finetune_assets.reporting.events import Event
from finetune_assets.worker import launch
from finetune_assets.worker.protocol import read_task
from tests.conftest import MiniProject
from tests.support.events import json_into
from tests.support.export_fixtures import VOCABULARY, converted, talkative

IDS = [[5, 17, 300, 42, 7], [9, 8, 7, 260, 261, 262, 30]]
TOKENS = sum(map(len, IDS))
ENDLESS = "model.layers.0.mlp.up_proj.weight"

pytestmark = pytest.mark.usefixtures("one_thread_each")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of four experts each, of which every token is sent to two."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("model") / "mixture"
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=2048,
        bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    return talkative(folder)


@pytest.fixture(scope="module")
def gguf(merged: Path, request: pytest.FixtureRequest) -> Path:
    return converted(merged, merged.with_name("f32.gguf"), request.config)


@pytest.fixture(scope="module")
def mixture_gguf(mixture: Path, request: pytest.FixtureRequest) -> Path:
    return converted(mixture, mixture.with_name("f32.gguf"), request.config)


def nothing(event: Event) -> None:
    pass


def close(found: Inputs, given: np.ndarray) -> bool:
    """Whether the sums are those of these inputs, (tokens, columns)."""
    return list(found.counts) == [len(given)] and np.allclose(found.sums[0], np.square(given).sum(0), rtol=1e-5)


def test_sums_are_those_of_every_layer_s_inputs(merged: Path, cpu: Device) -> None:
    import torch

    model = load_model(merged, None, cpu)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    given: dict[str, list[np.ndarray]] = {name: [] for name in layers}

    def note(name: str, _: Any, inputs: tuple[Any, ...]) -> None:
        given[name].append(inputs[0][0].detach().numpy())

    hooks = [module.register_forward_pre_hook(partial(note, name)) for name, module in layers.items()]
    events: list[dict[str, Any]] = []
    found = imatrix.collect(model, IDS, json_into(events))
    for hook in hooks:
        hook.remove()
    assert len(layers) == 2 * 7 + 1
    for name in layers.keys() - {"lm_head"}:  # of which only the last word is asked for
        assert close(found[f"{name}.weight"], np.concatenate(given[name])), name
    with torch.no_grad():
        read = torch.cat(
            [model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor(x))) for x in IDS]
        )
    assert close(found["model.layers.0.self_attn.k_proj.weight"], read.numpy())
    assert [event["step"] for event in events] == [1, 2] and {event["steps"] for event in events} == {2}


def test_every_expert_has_its_own(mixture: Path, mixture_gguf: Path, cpu: Device, tmp_path: Path) -> None:
    import torch

    model = load_model(mixture, None, cpu)
    experts = model.model.layers[0].mlp.experts
    sent: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = experts.register_forward_pre_hook(lambda _, args: sent.append((args[0].clone(), args[1].clone())))
    seen = imatrix.collect(model, IDS, nothing)
    hook.remove()
    states, chosen = (torch.cat(part) for part in zip(*sent, strict=True))
    gate_up, down = (seen[f"model.layers.0.mlp.experts.{name}_proj"] for name in ("gate_up", "down"))
    assert gate_up.counts.sum() == down.counts.sum() == 2 * TOKENS
    for expert in range(4):
        mine = states[(chosen == expert).any(-1)]
        with torch.no_grad():
            gate, up = (mine @ experts.gate_up_proj[expert].T).chunk(2, -1)
            within = experts.act_fn(gate) * up
        for found, inputs in ((gate_up, mine), (down, within)):
            assert found.counts[expert] == len(mine)
            assert np.allclose(found.sums[expert], inputs.double().square().sum(0).numpy(), rtol=1e-5)
    named = imatrix.named(seen, dict(model.named_parameters()), mixture_gguf)
    assert named["blk.0.ffn_gate_exps.weight"] is named["blk.0.ffn_up_exps.weight"] is gate_up
    assert named["blk.0.ffn_down_exps.weight"] is down
    matrices = {tensor.name for tensor in read_head(mixture_gguf).tensors if len(tensor.shape) > 1}
    assert matrices - named.keys() == {"token_embd.weight", "output.weight"}
    imatrix_file.write_imatrix(tmp_path / "i.gguf", named, dataset="x", chunks=2, chunk_size=512)
    values = imatrix_file.read_imatrix(tmp_path / "i.gguf").values["blk.0.ffn_down_exps.weight"]
    assert values.shape == (4, 96)
    for expert in np.flatnonzero(down.counts):
        assert np.allclose(values[expert], down.sums[expert] / down.counts[expert], rtol=1e-6)
    file = make_types(mixture_gguf, ["q4_0"], tmp_path, "m", imatrix_file.read_imatrix(tmp_path / "i.gguf"))["q4_0"]
    assert imatrix_file.facts(tmp_path / "i.gguf", file)["unused_experts"] == 0


def test_a_matrix_whose_columns_were_reordered_gets_none(merged: Path, gguf: Path, cpu: Device, tmp_path: Path) -> None:
    model = load_model(merged, None, cpu)
    seen, weights = imatrix.collect(model, IDS, nothing), dict(model.named_parameters())
    whole = imatrix.named(seen, weights, gguf)
    matrices = {tensor.name for tensor in read_head(gguf).tensors if len(tensor.shape) > 1}
    assert whole.keys() == matrices - {"token_embd.weight", "output.weight"}, "rows of Q and K are reordered as well"
    changed = Path(shutil.copyfile(gguf, tmp_path / "changed.gguf"))
    head, data = read_head(changed), np.memmap(changed, np.uint8, mode="r+")
    for tensor in head.tensors:
        begin = head.data_start + tensor.offset
        values = data[begin : begin + tensor.nbytes].view(np.float32).reshape(-1, tensor.shape[0])
        if tensor.name in ("blk.0.attn_output.weight", "blk.1.ffn_down.weight"):
            values[:] = values[:, ::-1].copy()
        if tensor.name == "blk.0.ffn_down.weight":
            values[:] = values[::-1].copy()
    data.flush()
    rest = imatrix.named(seen, weights, changed)
    assert whole.keys() - rest.keys() == {"blk.0.attn_output.weight", "blk.1.ffn_down.weight"}


def test_a_model_that_nothing_is_known_of_is_refused(merged: Path, gguf: Path, cpu: Device, tmp_path: Path) -> None:
    from finetune_assets.models.formats.gguf import STRING, write_with_head

    model = load_model(merged, None, cpu)
    seen, weights = imatrix.collect(model, IDS, nothing), dict(model.named_parameters())
    strange = read_head(gguf).with_value("general.architecture", STRING, "strange")
    write_with_head(gguf, strange, tmp_path / "strange.gguf")
    with pytest.raises(StepFailed, match="does not know the architecture strange"):
        imatrix.named(seen, weights, tmp_path / "strange.gguf")
    with pytest.raises(StepFailed, match="no weight matrix of llama"):
        imatrix.named({f"other.{name}": inputs for name, inputs in seen.items()}, weights, gguf)
    endless = seen[ENDLESS]
    with pytest.raises(StepFailed, match="non-finite activations"):
        imatrix.named({ENDLESS: Inputs(endless.sums * 1e40, endless.counts)}, weights, gguf)


def write(path: Path, count: int = 9) -> Path:
    """Rows of many lengths."""
    records = [
        {"id": f"{number * 7919 % 100:016x}", "dataset": "x", "messages": [
            {"role": "user", "content": "hello you " * number}, {"role": "assistant", "content": f"no {number}."}]}
        for number in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_which_rows_are_read(merged: Path, tmp_path: Path) -> None:
    chat, file = load_chat(merged), write(tmp_path / "train.jsonl")
    chosen = imatrix.choose(file, chat)
    texts = {str(chat.tokenizer.decode(ids)) for ids in chosen}
    assert len(chosen) == 9 and all(text.rstrip().endswith(".<|im_end|>") for text in texts), texts
    (tmp_path / "reversed.jsonl").write_text("\n".join(file.read_text().splitlines()[::-1]))
    assert imatrix.choose(tmp_path / "reversed.jsonl", chat) == chosen
    few = imatrix.choose(file, chat, tokens=len(chosen[0]) + len(chosen[1]) + 1)
    assert few == chosen[:2]
    assert imatrix.choose(file, chat, longest=8) == [ids[:8] for ids in chosen]
    told = Chat(chat.tokenizer, "Be brief.", chat.stop_token_ids)
    assert len(imatrix.choose(file, told)[0]) > len(chosen[0]), "the default system prompt, as in training"


def test_the_same_rows_give_the_same_bytes_in_any_process(
    merged: Path, gguf: Path, cpu: Device, tmp_path: Path
) -> None:
    train = write(tmp_path / "train.jsonl")
    imatrix.measure(merged, gguf, train, tmp_path / "here.gguf", cpu)
    job = {"task": "imatrix", "out": str(tmp_path), "merged": str(merged), "gguf": str(gguf), "device": "cpu"}
    job |= {"rows": str(train), "file": str(tmp_path / "there.gguf"), "model": {"model_name_or_path": "x"}}
    events: list[dict[str, Any]] = []
    assert launch.run(read_task(job), json_into(events), env={"OMP_NUM_THREADS": "1"}) == {}
    assert (tmp_path / "here.gguf").read_bytes() == (tmp_path / "there.gguf").read_bytes()
    assert [event["event"] for event in events] == ["message", *["step"] * 9]
    assert events[0]["text"].startswith("reading train rows to see which weights matter")
    (tmp_path / "validation.jsonl").write_text("\n")
    with pytest.raises(BadInput, match=r"gguf\.imatrix is validation, but there are no validation rows"):
        imatrix.measure(merged, gguf, tmp_path / "validation.jsonl", tmp_path / "x.gguf", cpu)


@pytest.mark.parametrize(
    ("imatrix_", "words"),
    [
        ("test", "gguf.imatrix: the test split measures the files"),
        ("validation", "gguf.imatrix is validation, but dataset.val_size is 0"),
        ("all", "gguf.imatrix: input should be 'train' or 'validation', not 'all'"),
    ],
)
def test_rows_that_will_not_do_are_refused(mini: MiniProject, imatrix_: str, words: str) -> None:
    mini.edit(gguf={"imatrix": imatrix_})
    with pytest.raises(BadInput) as caught:
        load_recipe(mini.recipe_path())
    assert words in str(caught.value) and len(caught.value.message.splitlines()) == 1
