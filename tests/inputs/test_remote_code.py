"""No code of a model runs unless the recipe trusts it: from a hub, a folder, in the converter, or elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.assets.base_model import BASE_MODEL
from finetune_assets.chat.tokenizer import load_tokenizer
from finetune_assets.export.gguf import converter
from finetune_assets.export.merge import merge
from finetune_assets.lineage.materialise import materialise
from finetune_assets.machine import child_environment
from finetune_assets.models import base_model
from finetune_assets.models.loading import load_network
from finetune_assets.recipe import EvaluateSection, ExportSection, ModelSection, TrainSection
from finetune_assets.recipe.file import load_recipe
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.store.digests import DigestCache
from finetune_assets.worker import launch
from finetune_assets.worker.protocol import read_task
from tests.conftest import REPOSITORY, make_mini
from tests.support.export_fixtures import converter_cache, tiny_adapter
from tests.support.hostile.own_code import (
    CONVERTED,
    NEEDED,
    SECRET,
    hostile,
    modules_folder,
    naming_code,
    to_convert,
    with_its_own_code,
    write_json,
)
from tests.support.servers.hub_server import HubServer, Repository
from tests.support.training_fixtures import chat, tiny_base, write_rows

IMPORTABLE = ("LICENSE_tok.py", "NOTICE.PY", "LICENSE.pyc", "USE_POLICY.so", "tokenization_x.py")
UNTRUSTED = ModelSection(model_name_or_path="./base")
TRUSTED = ModelSection(model_name_or_path="./base", trust_remote_code=True)
TRAIN = TrainSection(max_steps=2, per_device_train_batch_size=2, cutoff_len=64)


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    modules_folder(tmp_path / "modules", monkeypatch)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that hostile code writes; the test fails if it exists at the end."""
    file = tmp_path / "ran"
    yield file
    assert not file.exists(), f"code of a model ran and read {file.read_text()!r}"


@pytest.fixture
def evil(marker: Path, tmp_path: Path) -> str:
    """A class in a hostile file outside the model folder, as auto_map names it."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    hostile(folder / "evil.py", marker)
    return f"{folder}--evil.Tok"


@pytest.fixture(scope="module")
def cache(request: pytest.FixtureRequest) -> Path:
    return converter_cache(request.config)


# what is taken from a hub and from a folder


def test_code_of_a_hub_is_neither_downloaded_nor_run(
    tmp_path: Path, marker: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = to_convert(tmp_path / "repository", "GLM", "LICENSE_tok.Tok")
    for name in IMPORTABLE:
        hostile(repository / name, marker)
    with HubServer() as hub:
        hub.repositories["someone/some-model"] = Repository(repository, "0123456789abcdef0123456789abcdef01234567")
        script = (
            "import sys; from pathlib import Path; from finetune_assets.models import base_model\n"
            "from finetune_assets.recipe import ModelSection\n"
            "section = ModelSection(model_name_or_path='someone/some-model'); out = Path(sys.argv[1]); out.mkdir()\n"
            "base_model.fetch(section, out, out, out, lambda event: None)\n"
        )
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-c", script, str(tmp_path / "out")]
        subprocess.run(command, env={**os.environ, **own}, cwd=REPOSITORY, check=True, timeout=90)
        assert not set(hub.fetched()) & set(IMPORTABLE), hub.fetched()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]
    with pytest.raises(StepFailed, match=NEEDED):
        converter.convert_vocabulary(tmp_path / "out", tmp_path / "vocabulary.gguf", cache)


def test_code_of_a_folder_is_neither_copied_nor_run(tmp_path: Path, marker: Path, cache: Path) -> None:
    folder = to_convert(tmp_path / "base", "GLM", "LICENSE_tok.Tok")
    before = base_model.source_digests(UNTRUSTED, tmp_path, DigestCache(None))
    for name in IMPORTABLE:
        hostile(folder / name, marker)
    assert base_model.source_digests(UNTRUSTED, tmp_path, DigestCache(None)) == before
    (tmp_path / "out").mkdir()
    base_model.fetch(UNTRUSTED, tmp_path, tmp_path, tmp_path / "out", lambda event: None)
    assert not {path.name for path in (tmp_path / "out").iterdir()} & set(IMPORTABLE)
    with pytest.raises(StepFailed, match=NEEDED):
        converter.convert_vocabulary(tmp_path / "out", tmp_path / "vocabulary.gguf", cache)


def test_an_architecture_that_only_the_model_s_own_code_knows_is_refused_when_it_is_fetched(
    tmp_path: Path, marker: Path, evil: str
) -> None:
    naming_code(tmp_path / "base", evil, model_type="unheard_of")
    (tmp_path / "out").mkdir()
    with pytest.raises(StepFailed) as caught:
        base_model.fetch(UNTRUSTED, tmp_path, tmp_path, tmp_path / "out", lambda event: None)
    assert caught.value.message == f"cannot use base model ./base: {NEEDED} (config.json: AutoConfig: {evil})"
    assert "set model.trust_remote_code: true" in str(caught.value.hint)


def test_an_architecture_that_transformers_knows_loads_without_the_code(
    tmp_path: Path, marker: Path, evil: str
) -> None:
    import torch

    base = naming_code(tmp_path / "base", evil)
    write_json(base / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": [evil, None]}})
    (tmp_path / "out").mkdir()
    base_model.fetch(UNTRUSTED, tmp_path, tmp_path, tmp_path / "out", lambda event: None)
    assert type(load_network(tmp_path / "out", torch.float32)).__module__ == "transformers.models.llama.modeling_llama"
    assert type(load_tokenizer(tmp_path / "out")).__module__.startswith("transformers.")


# llama.cpp's converter


@pytest.mark.parametrize("kind", CONVERTED)
def test_the_converter_runs_no_code(kind: str, tmp_path: Path, marker: Path, cache: Path) -> None:
    base = to_convert(tmp_path / "base", kind, "LICENSE_tok.Tok")
    hostile(base / "LICENSE_tok.py", marker)  # as an older version of ours may have taken it along
    with pytest.raises(StepFailed) as caught:
        converter.convert_vocabulary(base, tmp_path / "vocabulary.gguf", cache)
    names = "tokenizer_config.json: AutoTokenizer: LICENSE_tok.Tok"
    assert caught.value.message == f"llama.cpp's converter cannot read the tokenizer of {base}: {NEEDED} ({names})"


@pytest.mark.parametrize(
    "reference", ["elsewhere--evil.Tok", "{tmp_path}/elsewhere--evil.Tok", "{tmp_path}/elsewhere/evil.Tok"]
)
def test_the_converter_runs_no_code_from_another_folder(
    reference: str, tmp_path: Path, evil: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = to_convert(tmp_path / "base", "Qwen 1", reference.format(tmp_path=tmp_path))
    with pytest.raises(StepFailed, match=NEEDED):
        converter.convert_vocabulary(base, tmp_path / "vocabulary.gguf", cache)


def test_without_its_guard_the_converter_has_no_folder_to_run_code_from(
    tmp_path: Path, marker: Path, cache: Path
) -> None:
    base = to_convert(tmp_path / "base", "Qwen 1", "LICENSE_tok.Tok")
    hostile(base / "LICENSE_tok.py", marker)
    scripts = converter.converter_dir(cache)
    options = ["--outfile", str(tmp_path / "vocabulary.gguf"), "--vocab-only"]
    done = subprocess.run(
        [sys.executable, str(scripts / converter.SCRIPT), str(base), *options],
        env={**child_environment.for_converter(trust=False), "PYTHONPATH": str(scripts / "gguf-py")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "/dev/null" in done.stderr, done.stderr


def test_an_unknown_architecture_is_still_called_that(tmp_path: Path, evil: str, cache: Path) -> None:
    base = to_convert(tmp_path / "base", "Qwen 1", evil)
    write_json(base / "config.json", {"architectures": ["StrangeForCausalLM"]})
    with pytest.raises(StepFailed, match="does not know the architecture StrangeForCausalLM"):
        converter.convert_vocabulary(base, tmp_path / "vocabulary.gguf", cache)


# workers


def evaluation(base: Path, adapter: Path, out: Path, model: ModelSection) -> dict[str, Any]:
    out.mkdir()
    rows = write_rows(out.parent / "train.jsonl", [chat("Who are you?", "I am Mizan.")])
    test = write_rows(out.parent / "test.jsonl", [chat("What is your name?", "Mizan.")])
    test.write_text(test.read_text(encoding="utf-8").replace('"id": "0', '"id": "f'), encoding="utf-8")
    files = {"base": str(base), "adapter": str(adapter), "rows": str(rows), "test": str(test), "out": str(out)}
    sections = {"train": TRAIN, "evaluate": EvaluateSection(max_new_tokens=4), "model": model}
    return {
        "task": "evaluate",
        "device": "cpu",
        **files,
        **{name: part.model_dump() for name, part in sections.items()},
    }


@pytest.mark.parametrize("of", ["the model", "the tokenizer"])
def test_evaluation_runs_no_code(of: str, tmp_path: Path, evil: str) -> None:
    base = tiny_base(tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter")
    load_tokenizer(base).save_pretrained(adapter)
    if of == "the model":
        auto_map = {"AutoConfig": evil, "AutoModelForCausalLM": evil}
        write_json(base / "config.json", {"auto_map": auto_map, "model_type": "unheard_of"})
    else:
        names = {"tokenizer_class": "AutoProcessor"}
        write_json(adapter / "tokenizer_config.json", names)
        write_json(adapter / "processor_config.json", {"auto_map": {"AutoProcessor": evil}})
    with pytest.raises(StepFailed, match=f"cannot load {of} .*{NEEDED}"):
        launch.run(read_task(evaluation(base, adapter, tmp_path / "scores", UNTRUSTED)), lambda event: None)


@pytest.mark.parametrize("task", ["train", "imatrix", "prove"])
def test_training_the_importance_matrix_and_the_proof_run_no_code(task: str, tmp_path: Path, evil: str) -> None:
    model = tiny_base(tmp_path / "model")
    write_json(model / "tokenizer_config.json", {"tokenizer_class": "AutoProcessor"})
    write_json(model / "processor_config.json", {"auto_map": {"AutoProcessor": evil}})
    rows = str(write_rows(tmp_path / "train.jsonl", [chat("Who are you?", "I am Mizan.")]))
    file = str(tmp_path / "x.gguf")
    own: dict[str, dict[str, Any]] = {
        "train": {
            "base": str(model),
            "rows": rows,
            "validation": None,
            "vocabulary": None,
            "train": TRAIN.model_dump(),
        },
        "imatrix": {"merged": str(model), "gguf": file, "rows": rows, "file": str(tmp_path / "imatrix.gguf")},
        "prove": {
            **{"merged": str(model), "held_out": rows, "files": {"f16": file}},
            **{"max_kl": {}, "recorded": {}, "written": {}},
        },
    }
    job = {"task": task, "out": str(tmp_path), "device": "cpu", "model": UNTRUSTED.model_dump(), **own[task]}
    with pytest.raises(
        StepFailed, match=f"cannot load the tokenizer .*{NEEDED} .processor_config.json: AutoProcessor: "
    ):
        launch.run(read_task(job), lambda event: None)


def test_a_merge_runs_no_code(tmp_path: Path, evil: str) -> None:
    base = tiny_base(tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter", bias="lora_only")  # which PEFT merges, with the whole model
    auto_map = {"AutoConfig": evil, "AutoModelForCausalLM": evil}
    write_json(base / "config.json", {"auto_map": auto_map, "model_type": "unheard_of"})
    held_out = write_rows(tmp_path / "test.jsonl", [chat("What is your name?", "Mizan.")])
    paths = {"base": base, "adapter": adapter, "out": tmp_path / "merged", "held_out": held_out}
    job: dict[str, Any] = {"task": "merge", **{name: str(path) for name, path in paths.items()}}
    sections = {"export": ExportSection().model_dump(), "model": UNTRUSTED.model_dump()}
    with pytest.raises(StepFailed, match=f"cannot load the model .*{NEEDED} .config.json: AutoConfig: "):
        launch.run(read_task({**job, **sections}), lambda event: None)


def test_a_merge_copies_no_code(tmp_path: Path, marker: Path, evil: str) -> None:
    base = naming_code(tmp_path / "base", evil)
    adapter = tiny_adapter(tiny_base(tmp_path / "plain"), tmp_path / "adapter")
    for name in ("LICENSE_tok.py", "tokenizer_x.py", "modeling_x.py"):
        hostile(base / name, marker)
        hostile(adapter / name, marker)
    (base / "LICENSE").write_text("as it is")
    merge.merge(base, adapter, tmp_path / "merged", export_size=5, export_dtype="auto")
    assert (tmp_path / "merged" / "LICENSE").is_file()
    assert not list((tmp_path / "merged").glob("*.py"))


# the command line's own process


@pytest.mark.parametrize("answer", ["y\n", ""])
def test_chat_runs_no_code_and_does_not_ask_whether_it_may(answer: str, tmp_path: Path, evil: str) -> None:
    base = tiny_base(tmp_path / "base")
    write_json(base / "tokenizer_config.json", {"tokenizer_class": "AutoProcessor"})
    write_json(base / "processor_config.json", {"auto_map": {"AutoProcessor": evil}})
    project = make_mini(tmp_path, base)
    materialise("base_model", load_recipe(project.recipe_path()), project, BASE_MODEL.build, lambda event: None)
    own = {"FINETUNE_PROJECT": str(project.root), "DAGSTER_HOME": str(project.home)}
    done = subprocess.run(
        [sys.executable, "-m", "finetune_assets.cli", "chat", "mini", "--with", "base", "-m", "Hello"],
        env={**os.environ, **own},
        cwd=REPOSITORY,
        input=answer,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 1 and NEEDED in done.stdout + done.stderr, done.stdout + done.stderr
    assert "[y/N]" not in done.stdout + done.stderr


# what the recipe trusts


def test_what_is_trusted_is_trained_evaluated_merged_and_converted_with_its_own_code(
    tmp_path: Path, cache: Path
) -> None:
    with_its_own_code(tmp_path / "base")
    base, adapter, merged = (tmp_path / name for name in ("fetched", "adapter", "merged"))
    for folder in (base, adapter, merged):
        folder.mkdir()
    base_model.fetch(TRUSTED, tmp_path, tmp_path, base, lambda event: None)
    rows = write_rows(tmp_path / "rows.jsonl", [chat("Who are you?", "I am Mizan."), chat("Your name?", "Mizan.")])
    job: dict[str, Any] = {
        **{"task": "train", "base": str(base), "rows": str(rows), "out": str(adapter), "device": "cpu"},
        **{"validation": None, "vocabulary": None, "train": TRAIN.model_dump(), "model": TRUSTED.model_dump()},
    }
    assert launch.run(read_task(job), lambda event: None)["steps"] == 2
    assert launch.run(read_task(evaluation(base, adapter, tmp_path / "scores", TRUSTED)), lambda event: None)
    paths = {"base": str(base), "adapter": str(adapter), "out": str(merged), "held_out": str(rows)}
    sections = {"export": ExportSection().model_dump(), "model": TRUSTED.model_dump()}
    assert launch.run(read_task({"task": "merge", "device": "cpu", **paths, **sections}), lambda event: None)["check"]
    import torch

    for folder in (base, merged):
        assert type(load_network(folder, torch.float32, trust_remote_code=True)).__name__ == "OwnForCausalLM"
        assert type(load_tokenizer(folder, trust_remote_code=True)).__name__ == "OwnTokenizer"
    with pytest.raises(StepFailed, match=NEEDED):
        load_network(merged, torch.float32)


def test_the_converter_runs_the_code_of_a_trusted_model(tmp_path: Path, cache: Path) -> None:
    base = to_convert(tmp_path / "base", "Qwen 1", "LICENSE_tok.Tok")
    marker = tmp_path / "ran"
    hostile(base / "LICENSE_tok.py", marker)
    with pytest.raises(StepFailed, match=r"llama\.cpp's converter failed"):  # Tok is not a tokenizer
        converter.convert_vocabulary(base, tmp_path / "vocabulary.gguf", cache, trust_remote_code=True)
    assert marker.read_text() == "ran", "and it has no token even then"
