"""Text of files and servers cannot control the terminal: rows, names, values, answers, errors."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from finetune_assets.cli import tables
from finetune_assets.cli.console import SafeConsole
from finetune_assets.cli.conversation import converse
from finetune_assets.cli.doctor import Check
from finetune_assets.models.engines.engine import Messages
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.reporting.printable import printable, printable_json
from tests.cli.test_cli import finetune
from tests.conftest import MiniProject, rows
from tests.support.history_fixtures import make_chain

CLEAR, TITLE, BIDI, C1 = "\x1b[2J", "\x1b]0;owned\x07", "\u202e", "\x9b31m"
NASTY = f"a{CLEAR}b{TITLE}c{BIDI}d{C1}e\x7f\x00\r"
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> bool:
    return STEERING.search(text) is None


def test_escaped_characters():
    assert printable("a\x1b[2J\x9bb\u202ec\ud800\r\n\td") == "a\\x1b[2J\\x9bb\\u202ec\\ud800\\x0d\n\td"
    assert printable("客服 é 👩\u200d💻 عربي") == "客服 é 👩\u200d💻 عربي"


@given(st.text(st.characters(exclude_categories=()), max_size=30))
def test_any_text(text: str):
    shown = printable(text)
    assert harmless(shown)
    shown.encode()
    assert all(unicodedata.category(character) != "Cc" or character in "\n\t" for character in shown)
    assert json.loads(printable_json({text: [text]})) == {text: [text]}
    assert harmless(printable_json({text: [text]}))


def shown(*things: object) -> str:
    console = SafeConsole(file=io.StringIO())
    for thing in things:
        console.print(thing)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_everything_that_a_console_prints(monkeypatch: pytest.MonkeyPatch):
    table = Table(NASTY)
    table.add_row(NASTY)
    tree = Tree(Text(NASTY))
    tree.add(NASTY)
    said = shown(NASTY, Text(NASTY, style="bold"), table, tree, tables.checks_table([Check("x", "ok", NASTY, NASTY)]))
    assert harmless(said) and said.count("\\x1b[2J") == 8
    assert shown("[bold]x[/] [/y] :smile:") == "[bold]x[/] [/y] :smile:\n", "no markup in what is printed"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    coloured = shown(Text(NASTY, style="bold"))
    assert coloured.startswith("\x1b[1m") and "\\x1b[2J" in coloured and CLEAR not in coloured


class Nasty:
    """An engine that answers as a hostile model would."""

    name = f"mini{CLEAR}"
    speed: float | None = None

    def stream(self, messages: Messages, *, max_new_tokens: int) -> Iterator[str]:
        if "fail" in messages[-1]["content"]:
            raise StepFailed(f"the server says {NASTY}")
        yield from NASTY

    def close(self) -> None:
        pass


def test_answers_and_errors_of_a_server(monkeypatch: pytest.MonkeyPatch):
    console = SafeConsole(file=io.StringIO())
    asked = iter(["hello", "fail", "/bye"])
    monkeypatch.setattr(console, "input", lambda *_, **__: next(asked))
    converse({"ollama": Nasty()}, console, system=None, message=None, max_new_tokens=9)
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert harmless(said) and "a\\x1b[2Jb" in said and "the server says a\\x1b[2J" in said


def test_names_rows_and_values_of_a_project(tmp_path: Path, mini: MiniProject):
    """A recipe value and a row with escape sequences, through a chain and every command that shows them."""
    (mini.empty_base() / f"{CLEAR}.json").write_text("{}")
    taken = NASTY.replace("\x00", "")  # NUL is refused in rows and recipes
    mini.write_rows([*rows(), {"instruction": taken, "input": "", "output": taken, "history": []}])
    mini.edit(ollama={"system": f"Be{CLEAR}good{BIDI}."}, model={"default_system": taken})
    made = make_chain(mini)
    mini.edit(ollama={"system": f"Be{C1}better{BIDI}."})
    (made["ollama_model"].path.parent / f"x{CLEAR}{BIDI}").mkdir()
    manifest = made["merged_model"].path / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "files": {NASTY.replace("\x00", ""): 1}}))
    for command in ("plan mini", "artifacts mini", "explain mini/ollama_model", "gc --dry-run", "verify mini"):
        for more in ((), ("--json",), ("--debug",)):
            done = finetune(mini, *command.split(), *more)
            assert harmless(done.stdout + done.stderr), command
            if more == ("--json",):
                json.loads(done.stdout)
    assert "\\x9b31mbetter" in finetune(mini, "plan", "mini").stdout
    assert "\\x1b[2J\\u202e: it has no manifest" in finetune(mini, "gc", "--dry-run").stdout


@pytest.mark.parametrize("more", [(), ("--debug",)])
def test_errors_about_files(mini: MiniProject, more: tuple[str, ...]):
    registry = {f"facts{CLEAR}": {"file_name": f"x{CLEAR}{BIDI}.json"}}
    (mini.root / "data" / "dataset_info.json").write_text(json.dumps(registry))
    mini.edit(dataset={"dataset": [f"facts{CLEAR}"]})
    done = finetune(mini, "plan", "mini", *more)
    assert done.returncode == 2 and "\\x1b[2J" in done.stderr
    assert harmless(done.stdout + done.stderr)
