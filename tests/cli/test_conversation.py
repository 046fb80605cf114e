"""Talking to one model or to several side by side: whose answer it is, how fast, and what each one remembers."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from rich.console import Console

from finetune_assets.cli.conversation import converse, open_engines
from finetune_assets.export.ollama.server.temporary import serving
from finetune_assets.machine.device import Device
from finetune_assets.models.engines.engine import Engine, Messages, answer
from finetune_assets.models.engines.llama_cpp_engine import GgufEngine
from finetune_assets.models.engines.ollama_engine import OllamaEngine
from finetune_assets.models.engines.transformers_engine import TransformersEngine
from finetune_assets.recipe.file import load_recipe
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import BadInput, StepFailed
from finetune_assets.store.artifact import Artifact
from tests.conftest import MiniProject
from tests.support.ollama.fixtures import needs_server, put, served, tiny_files
from tests.support.training_fixtures import tiny_base

QUESTION = [{"role": "user", "content": "Who are you?"}]


class Parrot:
    """Says how many messages it was given, and the last of them."""

    def __init__(self, name: str, speed: float | None = 12.34):
        self.name, self.speed = name, speed
        self.asked: list[Messages] = []

    def stream(self, messages: Messages, *, max_new_tokens: int) -> Iterator[str]:
        self.asked.append([dict(message) for message in messages])
        yield f"{self.name} "
        if messages[-1]["content"] == "Ctrl-C":
            raise KeyboardInterrupt
        if messages[-1]["content"] == "long":
            raise StepFailed("it does not fit", "ask for less")
        yield f"[{len(messages)}] {messages[-1]['content']}"

    def close(self) -> None:
        pass


def talk(
    engines: Mapping[str, Engine], *lines: str, message: str | None = None, system: str | None = None
) -> list[str]:
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        converse(engines, Console(file=out, width=100), system=system, message=message, max_new_tokens=8)
    return out.getvalue().replace(">>> ", "").splitlines()


def test_several_answer_in_turn_with_their_names_and_speeds():
    engines = {"base": Parrot("old"), "ollama": Parrot("new", speed=None)}
    said = talk(engines, "Hello [bold]", "again", "/reset", "third", "/bye", "never", system="Be brief.")
    assert said[0].startswith("talking to old, new; /bye or Ctrl-D to leave, /reset to start over")
    assert said[1:] == [
        *("base", "old [2] Hello [bold]", "12.3 tokens/s", "ollama", "new [1] Hello [bold]"),
        *("base", "old [4] again", "12.3 tokens/s", "ollama", "new [3] again"),
        *("base", "old [2] third", "12.3 tokens/s", "ollama", "new [1] third"),
    ]
    second = engines["base"].asked[1]
    assert [message["role"] for message in second] == ["system", "user", "assistant", "user"]
    assert second[2]["content"] == "old [2] Hello [bold]", "each remembers its own answers"
    assert [message["role"] for message in engines["ollama"].asked[1]] == ["user", "assistant", "user"], (
        "a served model has a system prompt of its own, whatever the recipe says by now"
    )


def test_what_is_not_answered_is_forgotten():
    engines = {"base": Parrot("old"), "gguf": Parrot("new")}
    said = talk(engines, "one", "Ctrl-C", "long", "two")
    assert said[-6:] == ["base", "old [3] two", "12.3 tokens/s", "gguf", "new [3] two", "12.3 tokens/s"]
    assert "interrupted; question discarded" in said
    assert said[said.index("it does not fit") :][:2] == ["it does not fit", "ask for less"]
    with pytest.raises(StepFailed, match="it does not fit"):  # one question has an exit code
        talk(engines, message="long")
    with pytest.raises(BadInput, match="-m: the message is empty"):
        talk(engines, message=" ")


def test_several_lines():
    engine = Parrot("old")
    talk({"base": engine}, '"""def f():', "    return 1", "", '"""', '"""one"""', '"""', "two", 'three"""', '"""open')
    assert [asked[-1]["content"] for asked in engine.asked] == ["def f():\n    return 1", "one", "two\nthree"]


def test_one_question():
    assert talk({"base": Parrot("old")}, message="Hi") == ["old [1] Hi"], "an answer that a program can read"
    assert talk({"base": Parrot("a"), "gguf": Parrot("b")}, message="Hi") == [
        *("base", "a [1] Hi", "12.3 tokens/s", "gguf", "b [1] Hi", "12.3 tokens/s")
    ]
    assert talk({"base": Parrot("old")}, "Hi")[1:] == ["old [1] Hi", "12.3 tokens/s"]


def test_stages_that_there_are(mini: MiniProject):
    recipe, nothing = load_recipe(mini.recipe_path()), dict[str, Artifact]()
    for stages, words in (("base,olama", "unknown stage 'olama'; did you mean 'ollama'?"), ("", "unknown stage ''")):
        with pytest.raises(BadInput, match=words), open_engines(stages, recipe, Project(mini.root, mini.home), nothing):
            pass
    unmade = open_engines("base, ollama", recipe, mini, nothing)
    with pytest.raises(StepFailed, match="mini/base_model has not been made yet"), unmade:
        pass


def test_a_file_that_was_asked_nothing_is_closed(
    smollm2: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
):
    """The stage after it cannot be opened, say. In a process of its own: llama.cpp would wait with the GIL held."""
    file = str(tiny_files(smollm2, tmp_path_factory, request.config).q8_0)
    code = "import pathlib, sys\nfrom finetune_assets.models.engines.llama_cpp_engine import GgufEngine\n" + (
        "for _ in range(6): GgufEngine(pathlib.Path(sys.argv[1])).close()"
    )
    subprocess.run([sys.executable, "-c", code, file], check=True, timeout=60)


def test_the_speed_of_a_folder(cpu: Device, tmp_path: Path, one_thread: None):
    engine = TransformersEngine(tiny_base(tmp_path / "base"), None, cpu)
    assert engine.speed is None
    answer(engine, QUESTION, 20)
    assert engine.speed is not None and engine.speed > 1


@needs_server
def test_the_speed_of_a_file_and_of_a_server(
    smollm2: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
):
    model = served(tiny_files(smollm2, tmp_path_factory, request.config).q8_0)
    file = GgufEngine(model.gguf)
    with serving(tmp_path_factory.mktemp("models")) as host:
        put(host, model)
        for engine in (file, OllamaEngine(host, model.name)):
            assert engine.speed is None
            answer(engine, QUESTION, 8)
            assert engine.speed is not None and engine.speed > 0.1
    file.close()
