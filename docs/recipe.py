"""The recipe reference: every key with its type, default, limits and description, read from the model.

usage: python -m docs.recipe > docs/recipe.md
"""

from __future__ import annotations

import json
from typing import Any

from finetune_assets.recipe.did_you_mean import did_you_mean
from finetune_assets.recipe.gguf_types import TYPES
from finetune_assets.recipe.recipe import LONGEST_NAME, sections
from finetune_assets.recipe.sections.section import LARGEST, Section

HEAD = """# Recipe reference

Printed by `python -m docs.recipe`.

A recipe is a YAML file in `configs/`. The file name without `.yaml` is the name of the recipe: at most {longest_name}
letters, digits, `_` and `-`. The smallest recipe names its data sets, its base model and the served model:

```yaml
dataset: {{dataset: [identity, fintech]}}
model: {{model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct}}
ollama: {{name: my-model}}
```

An unknown key is an error that suggests the nearest known key{example}.
Keys of `train` have LLaMA-Factory's names and meanings. Numbers are finite and at most {largest:,}. A list may also
be written as text: `types: f16,q8_0`. *none* means that the key is left out. With the first line
`# yaml-language-server: $schema=recipe.schema.json`, an editor shows these descriptions and checks the values.
"""
TAIL = """
## GGUF types

`gguf.types` and `ollama.types` take these, largest first. Bits are those of Llama 3.1 8B.

| type | bits per weight | changed by `gguf.imatrix` |
| --- | --- | --- |
"""
COLUMNS = ("key", "type", "default", "limits", "description")
TYPE_NAMES = {
    "string": "text", "integer": "whole number", "number": "number", "boolean": "true, false", "null": "none",
    "array": "list of texts", "object": "number for each name",
}  # fmt: skip
LIMITS = {
    "minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}",
    "minItems": "items: ≥ {}", "maxItems": "items: ≤ {}", "maxLength": "characters: ≤ {}",
    "pattern": "`{}`",
}  # fmt: skip


def page() -> str:
    """Return the page as text."""
    return "".join((_head(), *(_section(name, model) for name, model in sections().items()), _types()))


def _head() -> str:
    example = did_you_mean("learnig_rate", sections()["train"].model_fields).removeprefix("; ")
    return HEAD.format(longest_name=LONGEST_NAME, largest=LARGEST, example=f" (`{example}`)")


def _section(name: str, model: type[Section]) -> str:
    schema = model.model_json_schema()
    required = schema.get("required", [])
    rows = [_row(key, described, key in required) for key, described in schema["properties"].items()]
    heading = f"\n## `{name}`\n\n{schema['description']}\n\n"
    return heading + "".join(_line(cells) for cells in (COLUMNS, ("---",) * len(COLUMNS), *rows))


def _row(key: str, described: dict[str, Any], required: bool) -> tuple[str, ...]:
    kinds = described.get("anyOf", [described])
    inner = [kind["additionalProperties"] for kind in kinds if isinstance(kind.get("additionalProperties"), dict)]
    limits = [
        text.format(_number(part[limit]))
        for part in (*kinds, *inner)
        for limit, text in LIMITS.items()
        if limit in part
    ]
    default = "required" if required else _value(described.get("default"))
    kind = " or ".join(_type(kind) for kind in kinds)
    return (f"`{key}`", kind, default, ", ".join(limits), described["description"])


def _type(kind: dict[str, Any]) -> str:
    choices = kind.get("enum") or ([kind["const"]] if "const" in kind else None)
    return ", ".join(f"`{choice}`" for choice in choices) if choices else TYPE_NAMES[kind["type"]]


def _value(value: object) -> str:
    if value is None:
        return "none"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _types() -> str:
    rows = [(f"`{row.name}`", f"{row.bits:g}", "yes" if row.uses_imatrix else "no") for row in TYPES.values()]
    return TAIL + "".join(map(_line, rows))


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    print(page(), end="")
