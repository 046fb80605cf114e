"""The corruption battery: every harm is found by the check that is there for it, and no good file is accused.

What each check says of a finished project's model is in docs/battery.md.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.export.merge.merge import merge
from finetune_assets.export.ollama import create as ollama_create
from finetune_assets.export.ollama import model_store as ollama_store
from finetune_assets.export.ollama.expected_answer import Expected
from finetune_assets.export.ollama.publish import recorded
from finetune_assets.export.ollama.server.api import digests, show
from finetune_assets.export.ollama.server.temporary import serving
from finetune_assets.export.ollama.verify import verify
from finetune_assets.export.parity import merged as merge_check
from finetune_assets.export.parity.checks.architecture import PLAIN, architecture
from finetune_assets.export.parity.checks.structure import check_file
from finetune_assets.export.parity.checks.weights import check_weights
from finetune_assets.export.parity.held_out import POINTS
from finetune_assets.export.parity.limits import Figures, judge
from finetune_assets.export.parity.prove import CHECKS, Reference, check_content, examine, refer
from finetune_assets.machine.device import choose_device
from finetune_assets.models.formats.gguf import read_head
from finetune_assets.recipe.gguf_types import FILE_TYPES
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.store.artifact import Artifact
from finetune_assets.store.digests import digest_of_file
from tests.conftest import MiniProject
from tests.support.corruptions.files import PUBLISHED_HARMS, flip
from tests.support.corruptions.gguf_files import (
    BEGIN_OF_TEXT,
    GEMMA_HARMS,
    GGUF_HARMS,
    LLAMA_3_HARMS,
    LOUD_HARMS,
    WORD_HARMS,
    YARN_HARMS,
)
from tests.support.corruptions.harm import Harm, named
from tests.support.corruptions.merged_models import MERGED_HARMS
from tests.support.corruptions.served import NASTY, put_there, served_harms, slip
from tests.support.export_fixtures import (
    CHAT,
    as_merged,
    gguf_files,
    lively,
    tiny_adapter,
    tiny_base,
    tiny_tokenizer,
)
from tests.support.history_fixtures import make_chain, plan_of, store_of
from tests.support.ollama.fixtures import Files, needs_server, put, tiny_files, with_weights

HELD = ("f16", "q4_k_m")  # types that every harm is done to
NOT_ASKED = Expected("Hi", 1, "", 0, False)


pytestmark = pytest.mark.usefixtures("one_thread_each")


# GGUF files


@pytest.fixture(scope="module")
def files(merged: Path, request: pytest.FixtureRequest) -> dict[str, Path]:
    return gguf_files(merged, list(FILE_TYPES), request.config)


@pytest.fixture(scope="module")
def reference(merged: Path, held_out: Path) -> Reference:
    return refer(merged, held_out, choose_device(kind="cpu"))


def findings(kind: str, file: Path, reference: Reference, good: Path) -> tuple[Figures | None, dict[str, str]]:
    """The figures, and what the checks say that the file does not pass."""
    figures, failures = examine(file, reference)
    failures += check_file(file, digest_of_file(good))[1]
    failures += judge(kind, figures, {}) if figures else []
    return figures, {failure.check: str(failure) for failure in failures}


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_good_files_pass_every_check(kind: str, files: dict[str, Path], reference: Reference) -> None:
    figures, failed = findings(kind, files[kind], reference, files[kind])
    assert failed == {}
    assert figures is not None and figures.points == POINTS
    exact = {"f32": 1e-4, "f16": 1e-4, "bf16": 0.002, "q8_0": 0.01}
    assert figures.kl < exact.get(kind, 1.0), "limits have room"


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("harm", (*GGUF_HARMS, BEGIN_OF_TEXT), ids=lambda harm: harm.name)
def test_a_harmed_file_is_not_published(
    kind: str, harm: Harm[Callable[[Path], None]], files: dict[str, Path], reference: Reference, tmp_path: Path
) -> None:
    broken = Path(shutil.copyfile(files[kind], tmp_path / f"broken-{kind}.gguf"))
    harm.strike(broken)
    figures, failed = findings(kind, broken, reference, files[kind])
    assert harm.check in failed, failed
    assert failed.keys() <= {*CHECKS} and "bytes" in failed, "it is not what was written, whatever else it is"
    if harm in LOUD_HARMS:
        assert figures is not None and math.isfinite(figures.kl)
        assert failed.keys() == {"bytes", "weights", "kl"}, "what the model says shows it, too"
    elif harm.name == "one bit of a weight flipped":
        assert failed.keys() == ({"bytes", "weights"} if kind == "f16" else {"bytes"}), "too little for anything else"
    elif harm.check not in ("bytes", "tensors", "file", "weights"):
        assert "weights" not in failed


def test_a_token_that_the_model_has_no_row_for_is_no_fault(files: dict[str, Path], reference: Reference) -> None:
    """As gemma-3-1b's tokenizer has one for images."""
    tokenizer = copy.deepcopy(reference.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    assert check_content(read_head(files["f32"]), files["f32"], replace(reference, tokenizer=tokenizer)) == []


# Other shapes


def byte_level(folder: Path, tokenizer: Path, name: str, **changes: Any) -> None:
    """A random model of another architecture with a tokenizer that the converter knows for it."""
    import torch
    import transformers

    words: Any = transformers.AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": len(words), "hidden_size": 64, "intermediate_size": 128, "head_dim": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": 2,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**{**settings, "initializer_range": 0.08, **changes})
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    lively(model)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    as_merged(folder, words.chat_template)


BY_FREQUENCY = {
    "rope_type": "llama3", "rope_theta": 3e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
BY_LAYER = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e4},
    "sliding_attention": {"rope_type": "default", "rope_theta": 7e3},
}
YARN = {"rope_type": "yarn", "rope_theta": 2e4, "factor": 4.0, "original_max_position_embeddings": 128}


def tied(folder: Path) -> None:
    """One matrix for words in and out, a head of keys for each of queries, biases, and each frequency for itself."""
    tiny_base(folder, tied=True, num_key_value_heads=4, attention_bias=True, rope_parameters=BY_FREQUENCY)
    tiny_tokenizer(folder)
    as_merged(folder, CHAT)


# Of gemma3, conversations are longer than what a layer looks back on; of qwen3moe, there are rows without a token.
SHAPES: dict[str, Callable[[Path, Path], None]] = {
    "llama, tied": lambda folder, words: tied(folder),
    "gemma3": lambda folder, words: byte_level(
        folder, words, "Gemma3Text", rope_parameters=BY_LAYER, query_pre_attn_scalar=16, sliding_window=8
    ),
    "qwen3moe": lambda folder, words: byte_level(
        folder, words, "Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
        rope_parameters=YARN, vocab_size=49_200, initializer_range=0.05,
    ),
}  # fmt: skip


def beside_vision(folder: Path) -> Path:
    """The same model as the part that reads of one that sees as well, like gemma-3-4b."""
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(folder, folder.with_name("seeing")))
    tensors = load_file(folder / "model.safetensors")
    seeing = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    seeing["model.vision_tower.embeddings.patch_embedding.weight"] = next(iter(tensors.values())).clone()
    save_file(seeing, other / "model.safetensors", {"format": "pt"})
    return other


HARMS_OF = {"llama, tied": LLAMA_3_HARMS, "gemma3": (*WORD_HARMS, *GEMMA_HARMS), "qwen3moe": (*WORD_HARMS, *YARN_HARMS)}


@pytest.mark.parametrize("shape", SHAPES)
def test_no_good_file_of_another_shape_is_accused(
    shape: str, smollm2: Path, tmp_path: Path, held_out: Path, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / shape
    SHAPES[shape](folder, smollm2)
    made = gguf_files(folder, list(FILE_TYPES), request.config)
    compared = refer(folder, held_out, choose_device(kind="cpu"))
    for kind, file in made.items():
        assert architecture(read_head(file)) in PLAIN
        assert check_weights(read_head(file), file, folder) == [], kind
    for kind in ("f16", "q5_k_m"):
        assert findings(kind, made[kind], compared, made[kind])[1] == {}
    if shape == "gemma3":
        assert check_content(read_head(made["f16"]), made["f16"], replace(compared, merged=beside_vision(folder))) == []
    for harm in HARMS_OF[shape]:
        broken = Path(shutil.copyfile(made["f32"], tmp_path / "broken.gguf"))
        harm.strike(broken)
        assert {failure.check for failure in check_content(read_head(broken), broken, compared)} == {harm.check}, harm
    # each weight of each tensor counts: experts, biases, norms
    head = read_head(made["f32"])
    for tensor in [tensor for tensor in head.tensors if tensor.name != "rope_freqs.weight"]:
        with made["f32"].open("r+b") as data:
            data.seek(head.data_start + tensor.offset + tensor.nbytes - 2)
            was = data.read(1)
            data.seek(-1, 1)
            data.write(bytes([was[0] ^ 0x40]))
            data.flush()
            (failure,) = check_weights(head, made["f32"], folder)
            assert failure.measured.split()[3] == tensor.name
            data.seek(-1, 1)
            data.write(was)


# Merged models


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, an adapter of it, and the two merged."""
    folder = tmp_path_factory.mktemp("trained")
    base = tiny_base(folder / "base", tied=False)
    tiny_tokenizer(base)
    adapter = tiny_adapter(base, folder / "adapter")
    (folder / "merged").mkdir()
    merge(base, adapter, folder / "merged", export_size=5, export_dtype="auto")
    return base, adapter, folder / "merged"


@pytest.mark.parametrize("harm", MERGED_HARMS, ids=lambda harm: harm.name)
def test_a_harmed_merge_is_not_published(
    harm: Harm[Callable[[Path], None]], trained: tuple[Path, Path, Path], held_out: Path, tmp_path: Path
) -> None:
    base, adapter, good = trained
    broken = Path(shutil.copytree(good, tmp_path / "merged"))
    harm.strike(broken)
    with pytest.raises(StepFailed) as caught:
        merge_check.check(base, adapter, broken, held_out, choose_device(kind="cpu"))
    assert harm.check in named(caught.value), caught.value.message


# What lies published


@pytest.mark.parametrize("harm", PUBLISHED_HARMS, ids=lambda harm: harm.name)
def test_a_harmed_artifact_is_made_again(mini: MiniProject, harm: Harm[Callable[[Path], None]]) -> None:
    made = make_chain(mini)
    for asset in ("lora_adapter", "merged_model", "gguf_file", "ollama_model"):
        file = next(path for path in made[asset].path.iterdir() if path.name != "manifest.json")
        held = file.read_bytes()
        harm.strike(file)
        assert plan_of(mini)[asset].state != "fresh"
        assert file.name in str(made[asset].damage(store_of(mini).digests))
        file.write_bytes(held)
        assert plan_of(mini)[asset].state == "fresh"


@pytest.mark.parametrize("kind", ["model", "template", "system", "params"])
def test_our_own_store_is_read_again(mini: MiniProject, kind: str) -> None:
    mini.edit(ollama={"system": NASTY, "top_k": 3})
    make_chain(mini)
    manifest = json.loads(ollama_store.manifest_path(mini.ollama_models, "mini").read_bytes())
    (digest,) = [layer.digest for layer in ollama_store.layers_of(manifest) if layer.kind == kind]
    blob = ollama_store.blob_path(mini.ollama_models, digest)
    if kind == "system":
        assert blob.read_bytes() == NASTY.encode()
    shutil.copy2(blob, blob.with_suffix(".own"))  # the weights are a link to the artifact's
    blob.with_suffix(".own").replace(blob)
    stat = blob.stat()
    flip(blob)
    os.utime(blob, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert plan_of(mini)["ollama_model"].state == "fresh", "as old and as long as before: a plan reads no gigabytes"
    assert failed(mini)["blobs"].startswith(f"{kind}: sha256:") and len(failed(mini)) == 1


def failed(mini: MiniProject) -> dict[str, str]:
    """What `finetune verify` finds: check -> its words."""
    found = verify("mini", mini, store_of(mini), lambda event: None)
    return {check.name: check.found for checks in found.values() for check in checks if not check.ok}


# What is served


@pytest.fixture(scope="module")
def small(smollm2: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Files:
    return tiny_files(smollm2, tmp_path_factory, request.config)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("models")) as host:
        yield host


@pytest.fixture
def production(mini: MiniProject, small: Files, server: str, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """A model with a nasty system prompt on a real server."""
    with_weights(mini, small, monkeypatch)
    monkeypatch.setenv("OLLAMA_HOST", server)
    mini.edit(gguf={"types": ["q8_0"]}, ollama={"system": NASTY, "num_ctx": 256})
    return make_chain(mini)["ollama_model"]


@needs_server
def test_a_harmed_model_is_noticed_on_the_server(
    mini: MiniProject, production: Artifact, server: str, small: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert show(server, "mini:latest")["system"] == NASTY, "to the byte"
    assert failed(mini) == {}, "the tokens of its prompt and its answer included"
    create, before = ollama_create._create, digests(server)
    folder = store_of(mini).folder("mini", "gguf_file") / production.inputs["gguf_file"]
    (good,) = recorded(production.metrics, folder).values()
    for harm in served_harms(small.other):
        monkeypatch.setattr(ollama_create, "_create", slip(server, harm, create))
        with pytest.raises(StepFailed, match=f"does not serve mini:latest as it was made: {harm.check}: "):
            put(server, good, replies={good.name: NOT_ASKED})
        assert digests(server) == before, "what is served has not changed, and nothing is left"
    monkeypatch.undo()
    monkeypatch.setenv("OLLAMA_HOST", server)
    for harm in [harm for harm in served_harms(small.other) if harm.check in ("weights", "system")]:
        # by someone else's hand
        put_there(server, "mini:latest", harm.strike(good), create)
        assert {"digest", harm.check} <= failed(mini).keys(), harm.name
    with_weights(mini, small, monkeypatch)
    make_chain(mini)
    assert digests(server) == before and failed(mini) == {}, "the next run puts it back"
