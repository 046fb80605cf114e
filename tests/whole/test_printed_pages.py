"""Pages of docs/ that a long run prints: their fixed texts, limits and lists are those of the code.

docs/templates.md is compared in tests/export/ollama/test_templates_page.py, other pages in test_pages.py.
"""

from __future__ import annotations

import re

import pytest

from docs import battery, ollama, serving
from finetune_assets.export.parity.held_out import POINTS
from finetune_assets.export.parity.limits import MAX_KL
from tests.conftest import REPOSITORY
from tests.support.corruptions.files import PUBLISHED_HARMS
from tests.support.corruptions.gguf_files import GGUF_HARMS, LOUD_HARMS, WORD_HARMS
from tests.support.corruptions.harm import GGUF, MERGED, PUBLISHED
from tests.support.corruptions.merged_models import MERGED_HARMS

pytestmark = pytest.mark.fast


def page(name: str) -> str:
    return (REPOSITORY / "docs" / name).read_text(encoding="utf-8")


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def test_the_texts_of_the_battery() -> None:
    text = page("battery.md")
    cores = re.search(r"with (\d+) CPU\s+thread", text)
    assert cores is not None
    assert text.startswith(battery.head("demo", "q8_0"))
    assert battery.LIMITS in text and battery.TYPES.format(points=POINTS, cores=cores[1]) in text
    assert line(*battery.HARMS) in text and line(*battery.COLUMNS) in text


def test_the_limits_of_the_battery() -> None:
    types = [
        row.split(" | ") for row in page("battery.md").splitlines() if row.count(" | ") == len(battery.COLUMNS) - 1
    ]
    limits = {row[0].removeprefix("| "): row[3] for row in types}
    assert {kind: limits[kind] for kind in MAX_KL} == {kind: f"{limit:g}" for kind, limit in MAX_KL.items()}
    kinds = [kind for kind in MAX_KL if kind in battery.ROWS]
    assert line("weights", *kinds) in page("battery.md")
    assert line("limit", *(str(MAX_KL[kind]) for kind in kinds)) in page("battery.md")


def test_the_battery_has_every_harm() -> None:
    text = page("battery.md")
    for place, harms in ((MERGED, MERGED_HARMS), (GGUF, (*GGUF_HARMS, *WORD_HARMS))):
        for harm in harms:
            assert f"| {harm.name} | {place} | **{harm.check}**" in text
    for harm in PUBLISHED_HARMS:
        assert f"| {harm.name} | {PUBLISHED}: gguf_file | **{harm.check}**" in text
    assert all(f"\n| {harm.name} | " in text for harm in LOUD_HARMS)


def test_the_texts_of_the_ollama_page() -> None:
    text = page("ollama.md")
    assert any(text.startswith(ollama.head("demo", tool)) for tool in ollama.TOOLS)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == list(ollama.TITLES)


def test_the_texts_of_the_serving_page() -> None:
    text = page("serving.md")
    assert text.startswith(serving.HEAD.format(recipe="demo"))
    texts = (serving.INVENTORY, serving.ACCOUNT, serving.CONVERSATION, serving.ENDPOINT, serving.VERIFIED)
    places = [text.find(part) for part in (*texts, serving.COMPARED, serving.LLAMA_CPP, serving.VLLM)]
    assert places == sorted(places) and places[0] > 0
