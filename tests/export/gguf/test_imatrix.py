"""The importance matrix: whose inputs are counted, what is written, and which files are made again because of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest

from finetune_assets.assets import gguf_file
from finetune_assets.export.gguf import converter, imatrix, imatrix_file
from finetune_assets.export.gguf.imatrix_file import Inputs
from finetune_assets.export.gguf.quantise import make_types
from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.materialise import Step, materialise
from finetune_assets.lineage.plan import open_store
from finetune_assets.machine.device import Device
from finetune_assets.models.decoding import Chat, load_chat, load_model
from finetune_assets.models.formats.gguf import read_head
from finetune_assets.recipe.file import load_recipe
from finetune_assets.reporting.errors import BadInput, StepFailed
from finetune_assets.reporting.events import Event
from finetune_assets.store.artifact import Artifact, Made
from finetune_assets.worker import __main__ as worker
from finetune_assets.worker import launch
from tests.conftest import MiniProject, make_mini, rows
from tests.support.events import json_into
from tests.support.export_fixtures import CHATML, VOCABULARY, converter_cache, tiny_base, tiny_tokenizer
from tests.support.history_fixtures import BODIES

CHAT = CHATML.replace("<|im_start|>", "")  # which is the tokenizer's begin-of-text, and would be one too many
IDS = [[5, 17, 300, 42, 7], [9, 8, 7, 260, 261, 262, 30]]
TOKENS = sum(map(len, IDS))
ENDLESS = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module", autouse=True)
def one_thread_each(one_thread: None) -> Iterator[None]:
    """llama.cpp's threads wait for one another by spinning."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune_assets.models.engines.engine.cores", lambda: 1)
        yield


def talkative(folder: Path) -> Path:
    """Give a model folder what a merged model has beside its weights."""
    tiny_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    chat = {"template": CHAT, "default_system": None, "stop_token_ids": [2], "stop": ["<|im_end|>"]}
    (folder / "chat.json").write_text(json.dumps(chat))
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talkative(tiny_base(tmp_path_factory.mktemp("model") / "merged", tied=False, initializer_range=0.2))


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


def converted(model: Path, config: pytest.Config) -> Path:
    file = model.with_name("f32.gguf")
    converter.convert(model, file, "f32", converter_cache(config), name="tiny")
    return file


@pytest.fixture(scope="module")
def gguf(merged: Path, request: pytest.FixtureRequest) -> Path:
    return converted(merged, request.config)


@pytest.fixture(scope="module")
def mixture_gguf(mixture: Path, request: pytest.FixtureRequest) -> Path:
    return converted(mixture, request.config)


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
    with pytest.raises(StepFailed, match="numbers without end"):
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
    assert launch.run(job, json_into(events), env={"OMP_NUM_THREADS": "1"}) == {}
    assert (tmp_path / "here.gguf").read_bytes() == (tmp_path / "there.gguf").read_bytes()
    assert [event["event"] for event in events] == ["message", *["step"] * 9]
    assert events[0]["text"].startswith("reading train rows to see which weights matter")
    (tmp_path / "validation.jsonl").write_text("\n")
    with pytest.raises(BadInput, match=r"gguf\.imatrix is validation, but there are no validation rows"):
        imatrix.measure(merged, gguf, tmp_path / "validation.jsonl", tmp_path / "x.gguf", cpu)


@pytest.mark.parametrize(
    ("imatrix_", "words"),
    [
        ("test", "gguf.imatrix: the test rows are what the files are measured by"),
        ("validation", "gguf.imatrix is validation, but dataset.val_size is 0"),
        ("all", "gguf.imatrix: input should be 'train' or 'validation', not 'all'"),
    ],
)
def test_rows_that_will_not_do_are_refused(mini: MiniProject, imatrix_: str, words: str) -> None:
    mini.edit(gguf={"imatrix": imatrix_})
    with pytest.raises(BadInput) as caught:
        load_recipe(mini.recipe_path())
    assert words in str(caught.value) and len(caught.value.message.splitlines()) == 1


class Exports:
    """A project whose merged model is a given one; its GGUF files are made and proven for real."""

    def __init__(self, project: MiniProject, merged: Path):
        self.project = project
        self.tasks: list[str] = []
        self.said: list[str] = []

        def merge(step: Step) -> Made:
            shutil.copytree(merged, step.staging, dirs_exist_ok=True)
            return Made({"check": {"kl_from_base": 1e-6}})

        self.bodies = {**BODIES, "merged_model": merge, "gguf_file": gguf_file.build}

    def hear(self, event: Event) -> None:
        self.said.append(event.as_json().get("text", ""))

    def launch(self, job: dict[str, Any], progress: Any) -> dict[str, Any]:
        self.tasks.append(job["task"])
        return worker.TASKS[job["task"]]({**job, "device": "cpu"}, progress)

    def make(self, **gguf: Any) -> Artifact:
        """Bring everything up to gguf_file up to date."""
        self.project.edit(gguf=gguf)
        self.tasks.clear()
        self.said.clear()
        made = None
        for asset in list(NODES)[: list(NODES).index("gguf_file") + 1]:
            recipe = load_recipe(self.project.recipe_path())
            body = self.bodies[asset]
            made = materialise(asset, recipe, self.project, body, self.hear, launch=self.launch).artifact
        assert made is not None
        return made

    def splits(self) -> Mapping[str, str]:
        """The version of each split of the data."""
        data = open_store(self.project).current("mini", "dataset_info")
        assert data is not None
        return data.manifest["parts"]


@pytest.fixture
def exports(tmp_path: Path, merged: Path, request: pytest.FixtureRequest) -> Exports:
    project = make_mini(tmp_path)
    project.edit(dataset={"val_size": 2})
    project.cache.mkdir(parents=True)
    project.empty_base()
    (project.cache / f"{converter.PACKAGE}-{converter.VERSION}").symlink_to(
        converter.converter_dir(converter_cache(request.config))
    )
    return Exports(project, merged)


def inodes(artifact: Artifact) -> dict[str, int]:
    return {path.name.removeprefix("mini-"): path.stat().st_ino for path in artifact.path.glob("*.gguf")}


def told(artifact: Artifact, kind: str) -> Mapping[str, Any]:
    head = read_head(artifact.path / f"mini-{kind}.gguf")
    return {key.rpartition(".")[2]: head.get(key) for key in head.raw if key.startswith("quantize.imatrix.")}


def test_what_is_made_again_and_what_is_kept(exports: Exports) -> None:
    plain = exports.make(types=["f32", "q8_0", "q4_0"])
    assert exports.tasks == ["prove"] and "imatrix" not in plain.metrics and told(plain, "q4_0") == {}
    assert "gguf.imatrix" not in plain.manifest["ingredients"]["recipe"]
    assert plain.manifest["ingredients"]["upstreams"].keys() == {"merged_model", "dataset_info/test"}

    weighed = exports.make(imatrix="train")
    assert exports.tasks == ["imatrix", "prove"]
    before, after = inodes(plain), inodes(weighed)
    assert after.keys() - before.keys() == {"imatrix.gguf"}
    kept = {name for name in before if before[name] == after[name]}
    assert kept == {"f32.gguf", "q8_0.gguf"}, "linked, not made again"
    assert told(weighed, "q4_0") == {
        "file": "imatrix.gguf", "dataset": "train.jsonl", "entries_count": 14, "chunks_count": 8,
    }  # fmt: skip
    assert told(weighed, "q8_0") == {}
    content = [(artifact.path / "mini-q4_0.gguf").read_bytes() for artifact in (plain, weighed)]
    assert content[0] != content[1]
    assert weighed.metrics["types"]["f32"] == plain.metrics["types"]["f32"], "nor measured again"
    assert [text for text in exports.said if text.startswith("proving")] == ["proving q4_0 (3 of 3)"]
    assert any(text.startswith("q4_0: its rounding (") for text in exports.said)
    facts = weighed.metrics["imatrix"]
    assert facts | {"tokens": 0} == {
        "rows": "train", "conversations": 8, "tokens": 0, "entries": 14, "unused_experts": 0,
        "without": ["output.weight", "token_embd.weight"],
    }  # fmt: skip
    assert weighed.manifest["files"].keys() >= {"imatrix.gguf", "mini-q4_0.gguf"}
    table = gguf_file.describe(weighed)["weights weighed by"]
    assert isinstance(table, dg.TableMetadataValue)
    (row,) = table.records
    assert row.data["tokens"] == facts["tokens"] > 100 and row.data["without"] == "2: output.weight, token_embd.weight"

    more = exports.make(types=["f32", "q4_0", "q5_1"])
    assert exports.tasks == ["prove"], "the matrix is there"
    assert {name: inode for name, inode in inodes(more).items() if name != "q5_1.gguf"} == {
        name: inode for name, inode in after.items() if name != "q8_0.gguf"
    }
    assert told(more, "q5_1") == told(weighed, "q4_0") and more.metrics["imatrix"] == facts

    other = exports.make(imatrix="validation")
    assert exports.tasks == ["imatrix", "prove"] and told(other, "q4_0")["dataset"] == "validation.jsonl"
    assert {name for name in inodes(more) if inodes(more)[name] == inodes(other)[name]} == {"f32.gguf"}

    unneeded = exports.make(types=["f32", "q8_0"])
    assert exports.tasks == ["prove"] and "imatrix" not in unneeded.metrics and len(inodes(unneeded)) == 2

    assert exports.make(types=["f32", "q8_0", "q4_0"], imatrix=None).fingerprint == plain.fingerprint
    assert exports.tasks == []


def test_rows_count_only_where_they_are_read(exports: Exports) -> None:
    off = exports.make(types=["f32", "q4_0"])
    before, here = exports.splits(), rows()
    # one more to learn from, with the others split as they were
    for number in range(20):
        more = {"instruction": f"Say the word {number}.", "input": "", "output": f"Word {number}.", "history": []}
        exports.project.write_rows([*here, more])
        exports.make()
        after = exports.splits()
        if [before[name] == after[name] for name in ("train", "validation", "test")] == [False, True, True]:
            break
    else:
        pytest.fail("no row came into train alone")
    assert exports.make() == off, "the merged model came out as it was, and nothing else is read"
    on = exports.make(imatrix="train")
    exports.project.write_rows(here)
    again = exports.make()
    assert exports.tasks == ["imatrix", "prove"]
    assert inodes(again)["imatrix.gguf"] != inodes(on)["imatrix.gguf"]
    assert again.part_version("q4_0") != on.part_version("q4_0")
