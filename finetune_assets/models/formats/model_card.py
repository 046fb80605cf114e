"""The model card (README.md) of a Hugging Face folder: its licence and languages.

A derived model is bound by the licence of its base, so these facts are copied; llama.cpp's converter reads them
from the card. Facts that a card does not state are left out. Format: https://huggingface.co/docs/hub/model-cards#model-card-metadata
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

NAME = "README.md"
CARRIED = ("license", "license_name", "license_link", "language")


def read_card(folder: Path) -> dict[str, Any]:
    """Return the facts of `CARRIED` that a folder's card states; empty if there is no readable card."""
    try:
        lines = (folder / NAME).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    if not lines or lines[0].strip() != "---" or "---" not in (rest := [line.strip() for line in lines[1:]]):
        return {}
    try:
        facts = yaml.safe_load("\n".join(lines[1 : 1 + rest.index("---")]))
    except yaml.YAMLError:
        return {}
    return _stated(facts) if isinstance(facts, dict) else {}


def write_card(folder: Path, facts: Mapping[str, Any], text: str) -> None:
    """Write a card with the facts of `CARRIED` and the given text; without facts, write nothing."""
    if stated := _stated(facts):
        head = yaml.safe_dump(stated, sort_keys=True, allow_unicode=True)
        (folder / NAME).write_text(f"---\n{head}---\n\n{text}\n", encoding="utf-8")


def _stated(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return only texts and lists of texts. YAML reads the language `no` as false, which is undone here."""
    words = {key: value if isinstance(value, list) else [value] for key, value in facts.items() if key in CARRIED}
    clean = {key: ["no" if word is False else word for word in value] for key, value in words.items()}
    right = {key: value for key, value in clean.items() if value and all(isinstance(word, str) for word in value)}
    return {key: value if isinstance(facts[key], list) else value[0] for key, value in right.items()}
