"""What is wrong with an export is said before anything is begun, where it can be known, and in one message."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from copy import copy
from pathlib import Path

import pytest

from finetune_assets.lineage import prerequisites
from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.plan import open_store
from finetune_assets.lineage.prerequisites import check_prerequisites
from finetune_assets.models.formats.gguf import STRING, read_head, write_with_head
from finetune_assets.recipe.file import load_recipe
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.store.artifact import Artifact
from tests.cli.test_cli import finetune
from tests.conftest import MiniProject, rows
from tests.support.history_fixtures import make_chain, plan_of
from tests.support.ollama.fixtures import Files, tiny_files, with_weights


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The port of an ordinary web server."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield str(web.server_port)
        web.shutdown()
        thread.join()


def refused(project: MiniProject, code: int, *lines: str, **environment: str) -> None:
    """A run says this and no more, with this exit code, and makes nothing."""
    project.empty_base()
    done = finetune(project, "run", "mini", **environment)
    assert done.stderr.splitlines() == list(lines)
    assert done.returncode == code and not done.stdout
    assert not list(project.home.rglob("manifest.json")) and not (project.home / "history").exists()


def test_a_type_that_is_none(mini: MiniProject) -> None:
    mini.edit(gguf={"types": ["f16", "q4_km"]})
    line = 1 + mini.recipe_path().read_text().splitlines().index("  types:")
    refused(mini, 2, f"{mini.recipe_path()}:{line}: gguf.types: unknown GGUF type 'q4_km'; did you mean 'q4_k_m'?")


@pytest.mark.parametrize("name", ["my model", "Größe", "a:b", "-x", "a/b/c", "a.b/c", "a" * 81 + "/b", ""])
def test_a_name_that_ollama_does_not_take(mini: MiniProject, name: str) -> None:
    mini.edit(ollama={"name": name})
    line = 1 + next(n for n, text in enumerate(mini.recipe_path().read_text().splitlines()) if "  name:" in text)
    words = "use letters, digits, '.', '_' and '-'; begin with a letter, digit or '_'; use no '.' before a '/'"
    refused(mini, 2, f"{mini.recipe_path()}:{line}: ollama.name: {name!r} is not a valid Ollama model name: {words}")


def test_a_folder_that_is_no_llama_cpp(mini: MiniProject, tmp_path: Path) -> None:
    refused(
        mini,
        1,
        f"LLAMA_CPP_DIR={tmp_path} holds no convert_hf_to_gguf.py",
        "point it to a llama.cpp source folder, or unset it to use the pinned converter",
        LLAMA_CPP_DIR=str(tmp_path),
    )


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("127.0.0.1:{port}", "http://127.0.0.1:{port} is not an Ollama server: /api/version returned HTTP 404"),
        (":{port}", "http://127.0.0.1:{port} is not an Ollama server: /api/version returned HTTP 404"),
        ("https://127.0.0.1:{port}", "https://127.0.0.1:{port} is not an Ollama server: no secure connection (...)"),
        (
            "http://127.0.0.1:{port}/x",
            "http://127.0.0.1:{port}/x is not an Ollama server: /api/version returned HTTP 404",
        ),
        ("my server", "http://my server:11434 is not an Ollama server: not an address"),
        ("ftp://127.0.0.1:{port}", "ftp://127.0.0.1:{port} is not an Ollama server: not an address"),
        ("::::", "http://:::::11434 is not an Ollama server: not an address"),
    ],
)
def test_an_address_that_is_not_ollama_s(mini: MiniProject, elsewhere: str, host: str, why: str) -> None:
    mini.empty_base()
    done = finetune(mini, "run", "mini", OLLAMA_HOST=host.replace("{port}", elsewhere))
    said, hint = done.stderr.splitlines()
    assert said.startswith(why.replace("{port}", elsewhere).partition("(...")[0])
    assert "OLLAMA_HOST" in hint and "unset it" in hint
    assert done.returncode == 1 and not list(mini.home.rglob("manifest.json"))


def test_what_needs_no_server_runs_without_one(mini: MiniProject, elsewhere: str) -> None:
    mini.empty_base()
    done = finetune(mini, "run", "mini", "--to", "dataset_info", OLLAMA_HOST=f"127.0.0.1:{elsewhere}")
    assert done.returncode == 0, done.stderr


def test_what_counts_against_the_disk(mini: MiniProject, monkeypatch: pytest.MonkeyPatch) -> None:
    def needed(*, forced: tuple[str, ...] = ()) -> str:
        """Which assets are counted, when nothing is free."""
        monkeypatch.setattr(prerequisites, "free_bytes", lambda folder: -1)
        with pytest.raises(StepFailed) as caught:
            check_prerequisites(load_recipe(mini.recipe_path()), mini, open_store(mini), list(NODES), forced=forced)
        return caught.value.message

    made: dict[str, Artifact] = make_chain(mini)
    assert "about 0 B are needed ()" in needed()
    assert f"(base_model {made['base_model'].size} B)" in needed(forced=("base_model",))
    mini.write_rows(rows(14))
    words = needed()
    assert "(raw_dataset " in words and "," not in words.partition("(")[2].partition(")")[0], "the rest may stay"
    mini.edit(train={"learning_rate": 0.5})
    assert plan_of(mini)["merged_model"].state == "maybe"
    assert all(f"{name} " in needed() for name in ("raw_dataset", "lora_adapter", "merged_model", "gguf_file"))


@pytest.fixture(scope="module")
def files(smollm2: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Files:
    return tiny_files(smollm2, tmp_path_factory, request.config)


def test_a_system_prompt_that_fills_the_context(
    mini: MiniProject, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_weights(mini, files, monkeypatch)
    mini.edit(gguf={"types": ["f32"]}, ollama={"num_ctx": 64, "system": "Be brief. " * 60})
    with pytest.raises(
        StepFailed, match=r"the system prompt and 'Who are you\?' take \d+ tokens of a context of 64"
    ) as no:
        make_chain(mini)
    assert no.value.hint == "raise ollama.num_ctx, or shorten the system prompt"
    mini.edit(ollama={"system": "Be brief."})
    make_chain(mini)


def test_white_space_that_the_chat_template_takes_away(
    mini: MiniProject, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """YAML's `system: |` ends in a line break. Served with it, the prompt would be another than the one learnt from."""
    head, key = read_head(files.f32), "tokenizer.chat_template"
    trimming = head.get(key).replace("message['content']", "message['content'] | trim")
    write_with_head(files.f32, head.with_value(key, STRING, trimming), tmp_path / "trimming.gguf")
    changed = copy(files)
    changed.f32 = tmp_path / "trimming.gguf"
    with_weights(mini, changed, monkeypatch)
    mini.edit(gguf={"types": ["f32"]}, ollama={"system": "Be brief.\n"})
    assert make_chain(mini)["ollama_model"].metrics["system"] == "Be brief."


def test_a_context_longer_than_the_model_s(mini: MiniProject, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    with_weights(mini, files, monkeypatch)
    mini.edit(gguf={"types": ["f32"]}, ollama={"num_ctx": 4096})
    note = "ollama.num_ctx is 4096, but the model was made for 512 tokens: servers use that"
    assert note in make_chain(mini)["ollama_model"].metrics["notes"]
    mini.edit(ollama={"num_ctx": 512})
    assert make_chain(mini)["ollama_model"].metrics["notes"] == []
