"""docs/templates.md is what its generator prints, and a real server of before 0.30 agrees with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from docs.templates import COLUMNS, HEAD, Row, counted, ordinary, row_of, serve_bytes, totals
from finetune_assets.chat.pinning import pinned
from finetune_assets.chat.rendering import render_jinja
from finetune_assets.export.ollama.server.temporary import serving
from tests.conftest import REPOSITORY
from tests.support.export_fixtures import CHATML
from tests.support.ollama.fixtures import needs_server
from tests.support.ollama.template_files import SPECIALS, published

PAGE = (REPOSITORY / "docs" / "templates.md").read_text(encoding="utf-8")
LINES = PAGE.splitlines()


def rows_of_the_page() -> list[Row]:
    lines = [line for line in LINES if line.startswith(("| llama.cpp/", "| trl/"))]
    return [Row(*(cell.strip() for cell in line.strip("|").split(" | "))) for line in lines]


def test_the_page_adds_up() -> None:
    rows = rows_of_the_page()
    assert LINES[-1] == totals(rows) and len(rows) == 142
    assert PAGE.startswith(HEAD.format(talks=len(ordinary()), release="0.9.3"))
    assert f"| {' | '.join(COLUMNS)} |" in LINES
    # each way is equal, or the template is refused before training
    assert all(row.template.startswith(("equal", "refused")) for row in rows)
    assert all(row.jinja.startswith(("equal", "refused")) for row in rows)


def test_the_page_holds(tmp_path: Path) -> None:
    """For what TRL brings."""
    ours = published()
    assert len(ours) > 60 and {row.name for row in rows_of_the_page() if row.name.startswith("trl/")} == set(ours)
    for name, text in ours.items():
        assert str(row_of(name, text, tmp_path)[0]) in LINES, name


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from ollama import Client

    folder = tmp_path_factory.mktemp("bytes")
    with serving(folder / "models") as host:
        client = Client(host=host, timeout=300, trust_env=False)
        serve_bytes(client, folder)
        yield client


@needs_server
@pytest.mark.parametrize("name", ["trl/llama3_2", "trl/qwen3", "trl/gemma3", "trl/gptoss", "trl/cohere"])
def test_a_real_server_reads_as_many_bytes(client: Any, tmp_path: Path, name: str) -> None:
    text = pinned(published()[name])
    _, proof = row_of(name, text, tmp_path)
    assert proof is not None and counted(client, text, proof) is None
    longer = replace(proof, template=replace(proof.template, text=proof.template.text + "!"))
    assert "tokens instead of" in str(counted(client, text, longer))


@needs_server
def test_an_old_server_refuses_tools_by_name(client: Any, tmp_path: Path) -> None:
    from ollama import ResponseError

    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    _, proof = row_of("tools", template, tmp_path)
    assert proof is not None and proof.current.path == "jinja" and counted(client, template, proof) is None
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(ResponseError, match="does not support tools"):
        client.chat(model="letters", messages=[{"role": "user", "content": "hi"}], tools=[tool])


@needs_server
def test_go_spells_tools_otherwise(client: Any) -> None:
    """Why TEMPLATEs have no tools: no spaces, escaped <, > and &; the chat template's `tojson` has neither."""
    city = {"type": "string", "description": "a <b> & c"}
    parameters = {"type": "object", "required": ["city"], "properties": {"city": city}}
    tool = {"type": "function", "function": {"name": "f", "description": "the weather", "parameters": parameters}}
    client.create(
        model="tools", from_="bytes", template="{{ json .Tools }}{{ range .Messages }}{{ .Content }}{{ end }}"
    )
    hello = [{"role": "user", "content": "hi"}]
    read = client.chat(model="tools", messages=hello, tools=[tool], options={"num_predict": 1}).prompt_eval_count - 2
    spelt = json.dumps([tool], separators=(",", ":"))
    for character in "<>&":
        spelt = spelt.replace(character, f"\\u{ord(character):04x}")
    assert read == len(spelt) != len(render_jinja("{{ tools | tojson }}", hello, SPECIALS, tools=[tool]))
