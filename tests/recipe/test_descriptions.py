"""Every key of a recipe is described, with the unit of its numbers."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic.fields import FieldInfo

from finetune_assets.recipe.recipe import Recipe, sections
from finetune_assets.recipe.sections.section import types_in

pytestmark = pytest.mark.fast

KEYS = {f"{name}.{key}": field for name, model in sections().items() for key, field in model.model_fields.items()}
UNIT = re.compile(r"(?:Unit: [a-zA-Z].*|No unit)\.$")


def is_number(annotation: Any) -> bool:
    return not {int, float}.isdisjoint(types_in(annotation))


@pytest.mark.parametrize("key", KEYS)
def test_each_key_has_a_description(key: str):
    text = KEYS[key].description or ""
    assert text.endswith(".") and text[0].isupper(), f"{key}: describe it in a sentence"
    assert len(text) <= 200


@pytest.mark.parametrize("key", [key for key, field in KEYS.items() if is_number(field.annotation)])
def test_each_number_has_a_unit(key: str):
    assert UNIT.search(KEYS[key].description or ""), f"{key}: end its description with 'Unit: ...' or 'No unit.'"


def test_keys_that_are_no_numbers_have_no_unit():
    described = {key: field.description or "" for key, field in KEYS.items() if not is_number(field.annotation)}
    assert not [key for key, text in described.items() if UNIT.search(text)]


def test_each_section_and_the_name_are_described():
    assert all(model.__doc__ and model.__doc__.endswith(".") for model in sections().values())
    name: FieldInfo = Recipe.model_fields["name"]
    assert name.description
