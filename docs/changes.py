"""The page docs/changes.md: each kind of change, made on a copy of a finished project, and the plan after it.

usage: python docs/changes.py RECIPE [> docs/changes.md]
Run the recipe first (`make demo`). Artifacts are linked, not copied; the project itself does not change.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parent.parent
HEAD = """# What each change touches

`python docs/changes.py {recipe}` prints this page. It makes each change on its own copy of the finished project, and
`finetune plan {recipe}` lists what a run would do. *maybe* means that an upstream asset runs: if its result is the
same as before, the asset stays as it is.
"""


class Copy:
    """A copy of the project with all of its artifacts."""

    def __init__(self, root: Path, recipe: str):
        self.root, self.home, self.recipe = root, root / "dagster_home", root / "configs" / f"{recipe}.yaml"
        built = Path(os.environ.get("DAGSTER_HOME") or PROJECT / "dagster_home")
        for name in ("configs", "data"):
            shutil.copytree(PROJECT / name, root / name)
        shutil.copyfile(PROJECT / "pyproject.toml", root / "pyproject.toml")
        for name in ("artifacts", "ollama"):
            shutil.copytree(built / name, self.home / name, copy_function=os.link)
        (self.home / "cache").mkdir()
        shutil.copyfile(built / "cache" / "digests.sqlite", self.home / "cache" / "digests.sqlite")

    def plan(self) -> str:
        """Return the output of `finetune plan`."""
        environment = {
            **os.environ,
            "FINETUNE_PROJECT": str(self.root),
            "DAGSTER_HOME": str(self.home),
            "OLLAMA_HOST": "127.0.0.1:9",
            "COLUMNS": "118",
        }
        command = [sys.executable, "-m", "finetune_assets.cli", "plan", self.recipe.stem]
        return subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, check=True).stdout

    def set(self, section: str, **values: Any) -> None:
        """Change values of the recipe."""
        content = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        content.setdefault(section, {}).update(values)
        self.recipe.write_text(yaml.safe_dump(content, sort_keys=True, allow_unicode=True), encoding="utf-8")

    def data(self) -> Path:
        """Return the file of the recipe's first data set."""
        names = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))["dataset"]["dataset"]
        registry = json.loads((self.root / "data" / "dataset_info.json").read_text(encoding="utf-8"))
        return self.root / "data" / registry[names[0]]["file_name"]

    def edit_rows(self, edit: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], indent: int | None = 2) -> None:
        rows = json.loads(self.data().read_text(encoding="utf-8"))
        self.data().write_text(json.dumps(edit(rows), ensure_ascii=False, indent=indent), encoding="utf-8")

    def published(self, asset: str, name: str) -> Path:
        """Return a file of an asset's current artifact, replaced by a copy that a change may damage."""
        folder = self.home / "artifacts" / self.recipe.stem / asset
        path = folder / (folder / "CURRENT").read_text().strip() / name
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        return path


def comment(copy: Copy) -> None:
    copy.set("train", seed=42, logging_steps=1, weight_decay=0.0)
    copy.recipe.write_text("# a comment\n\n" + copy.recipe.read_text(encoding="utf-8"), encoding="utf-8")


def flip_a_bit(copy: Copy) -> None:
    path = copy.published("lora_adapter", "adapter_model.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def new_and_changed_rows(copy: Copy) -> None:
    new = [{"instruction": f"Which number is this? {n}", "input": "", "output": str(n)} for n in range(3)]
    copy.edit_rows(lambda rows: [{**rows[0], "output": rows[0]["output"] + " Indeed."}, *rows[1:], *new])


CHANGES: list[tuple[str, Callable[[Copy], object]]] = [
    ("Nothing", lambda copy: None),
    ("A comment, another order of keys, defaults spelled out", comment),
    ("A data file touched", lambda copy: os.utime(copy.data())),
    ("A data file re-formatted, its rows reversed", lambda copy: copy.edit_rows(lambda rows: rows[::-1], indent=None)),
    ("Three rows added, one changed", new_and_changed_rows),
    ("`dataset.test_size`: more rows held out", lambda copy: copy.set("dataset", test_size=0.2)),
    ("`train.learning_rate`", lambda copy: copy.set("train", learning_rate=5e-4)),
    ("`evaluate.max_new_tokens`", lambda copy: copy.set("evaluate", max_new_tokens=32)),
    ("`gguf.types`: one more", lambda copy: copy.set("gguf", types=["f16", "q8_0", "q4_k_m"])),
    ("`ollama.system`", lambda copy: copy.set("ollama", system="You are Mizan. Be brief.")),
    ("A file of the adapter deleted", lambda copy: copy.published("lora_adapter", "adapter_config.json").unlink()),
    ("One bit of the adapter flipped", flip_a_bit),
]


def main(recipe: str) -> None:
    print(HEAD.format(recipe=recipe))
    for title, change in CHANGES:
        with tempfile.TemporaryDirectory(dir=PROJECT / "dagster_home") as folder:
            copy = Copy(Path(folder), recipe)
            change(copy)
            print(f"## {title}\n\n```text\n{copy.plan().rstrip()}\n```\n")


if __name__ == "__main__":
    main(sys.argv[1])
