"""The base of every section: no unknown keys, no huge numbers, no true for a number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

LONGEST_PATH = 1000  # characters
LARGEST = 2**32  # limit of every number in a recipe; numpy accepts smaller seeds only

Names = Annotated[
    list[str],
    BeforeValidator(lambda value: [part.strip() for part in value.split(",")] if isinstance(value, str) else value),
]


class Section(BaseModel):
    """A part of the recipe. It refuses unknown keys, checks values and is immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number belongs; Python would accept them."""
        kinds = set(types_in(cls.model_fields[str(info.field_name)].annotation))
        given = value.values() if isinstance(value, dict) else [value]
        if kinds & {int, float} and bool not in kinds and any(isinstance(item, bool) for item in given):
            raise ValueError(f"must be a number, not {str(value).lower()}")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _no_number_is_huge(cls, value: Any) -> Any:
        for number in value.values() if isinstance(value, dict) else [value]:
            if isinstance(number, int | float) and abs(number) > LARGEST:
                raise ValueError(f"is too large (limit {LARGEST})")
        return value


def types_in(annotation: Any) -> Iterator[Any]:
    """Yield a type and the types inside it: int and None of `int | None`."""
    yield annotation
    for part in get_args(annotation):
        yield from types_in(part)
