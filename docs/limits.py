# ruff: noqa: E501 (rows of a table)
"""The page on limits of inputs; each limit is read from the code.

usage: python -m docs.limits > docs/limits.md
"""

from __future__ import annotations

from finetune_assets.assets.lora_adapter import TRIED_ROWS
from finetune_assets.chat import template_limits
from finetune_assets.data.files.json_file import REGISTRY_SIZE
from finetune_assets.inputs.json_text import DIGITS, MODEL_FILE
from finetune_assets.models.formats.safetensors import LONGEST_HEAD
from finetune_assets.recipe import yaml_text
from finetune_assets.recipe.recipe import LONGEST_NAME
from finetune_assets.recipe.sections.section import LARGEST, LONGEST_PATH
from finetune_assets.reporting.printable import human_size

PAGE = """# Limits on inputs

Printed by `python -m docs.limits`.

Every file that people or hubs provide is read within limits. A file that exceeds one is refused before anything starts
(exit code 2), with its name and the line or key. It stops nothing else: other recipes, sensors and the Dagster
definitions continue.

| input | limit |
|---|---|
| recipe | a regular file of at most {recipe_bytes}; {nodes:,} keys and values, each use of an alias counted; {depth} levels; words, numbers, true, false and null only |
| recipe name | letters of any script, digits, `_` and `-`; begins with a letter; at most {name} characters (composed form, NFC) |
| number in a recipe | finite, at most {number:,}; true and false are not numbers; a split above 1 is a whole number of rows |
| path in a recipe | {path:,} characters |
| cron expression | what Dagster accepts, and a day that one of its months has |
| dataset_info.json | a regular file of at most {registry} |
| dataset_info.json and rows | UTF-8 JSON; no key given twice; finite numbers of at most {digits} digits; no NUL character; no lone surrogate |
| base model folder | has `config.json`; only the folder's own files are looked at; each is a regular file |
| JSON of a model | an object of at most {model_json}; numbers of at most {digits} digits |
| head of a safetensors file | {head} |
| chat template | {template:,} characters; {seconds} s and {memory} of address space to render short conversations and the first {rows} rows, in a process of its own, before the device is held; {seconds} s for each conversation afterwards |

Dagster accepts ASCII letters, digits and `_` in names. A recipe with any other name, such as `客服`, has an ASCII form
of its name with a digest there (`u5ba2_u670d_` and six digits). The command line, the artifact folder, descriptions
and the tag `recipe` of runs show the name itself.

A recipe that cannot be read appears in Dagster as a group with one asset, whose description is the message. The
sensor `observe` repeats the message in each tick, and `finetune plan NAME` prints it.
"""


def page() -> str:
    """Return the page as text."""
    return PAGE.format(
        recipe_bytes=_size(yaml_text.BYTES),
        nodes=yaml_text.NODES,
        depth=yaml_text.DEPTH,
        name=LONGEST_NAME,
        number=LARGEST,
        path=LONGEST_PATH,
        registry=_size(REGISTRY_SIZE),
        digits=DIGITS,
        model_json=_size(MODEL_FILE),
        head=_size(LONGEST_HEAD),
        rows=TRIED_ROWS,
        template=template_limits.LARGEST,
        seconds=template_limits.SECONDS,
        memory=_size(template_limits.MEMORY),
    )


def _size(count: int) -> str:
    return human_size(count).replace(".0 ", " ")


if __name__ == "__main__":
    print(page(), end="")
