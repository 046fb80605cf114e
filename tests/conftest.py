"""What the tests share: the real small model, a tiny random one, and projects of their own."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from finetune_assets.machine.device import Device, choose_device
from finetune_assets.models import base_model
from finetune_assets.recipe.file import load_recipe
from finetune_assets.recipe.project import Project
from tests.support.tiny_model import tiny_model

FAST = "pytestmark = pytest.mark.fast"
REPOSITORY = Path(__file__).resolve().parent.parent

os.environ["HF_HUB_OFFLINE"] = "1"  # no test talks to a hub
os.environ["OLLAMA_HOST"] = "127.0.0.1:9"  # nor to a server that happens to run here
_TEMPORARY = tempfile.TemporaryDirectory(prefix="finetune-tests-")
os.environ["TMPDIR"] = _TEMPORARY.name  # what tests start does not wait for a device that is in use here


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="run only the files marked fast; the others are not even imported"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignore a test file that is not marked fast: what it imports takes seconds, even when none of its tests runs."""
    if not config.getoption("--fast") or not collection_path.match("test_*.py"):
        return None
    return FAST not in collection_path.read_text(encoding="utf-8") or None


def shared_cache() -> Path:
    """Where the tests keep what can be fetched or computed again, from one run to the next."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-assets"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo's base model, as the demo makes it: SmolLM2-135M-Instruct in float32, in a folder kept between runs."""
    recipe = load_recipe(REPOSITORY / "configs" / "demo.yaml")
    cache = shared_cache()
    folder = cache / "tests" / f"smollm2-{str(recipe.model.model_sha256)[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "tests.lock"):
        if not folder.is_dir():
            staging = folder.with_name(folder.name + ".partial")
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            base_model.fetch(recipe.model, REPOSITORY, cache, staging, lambda event: None)
            staging.rename(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with the real tokenizer and chat template: seconds for a whole chain."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    tiny_model(smollm2, folder)
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch on one thread: in a tiny model several only get into each other's way."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cpu() -> Device:
    return choose_device(kind="cpu")


class MiniProject(Project):
    """A project in a temporary folder, with one recipe that the tests edit."""

    def recipe_path(self, name: str = "mini") -> Path:
        return self.configs / f"{name}.yaml"

    def edit(self, name: str = "mini", **sections: dict[str, Any]) -> None:
        """Set keys of a recipe's sections: edit(train={"learning_rate": 1e-3}); None removes a key."""
        content = yaml.safe_load(self.recipe_path(name).read_text())
        for section, values in sections.items():
            merged = {**content.get(section, {}), **values}
            content[section] = {key: value for key, value in merged.items() if value is not None}
        self.recipe_path(name).write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))

    def empty_base(self) -> Path:
        """The folder that the recipe names as its base: enough of a model to be planned with."""
        base = self.root / "base"
        base.mkdir(exist_ok=True)
        if not (base / "config.json").exists():
            (base / "config.json").write_text("{}")
        return base

    def copy_recipe(self, name: str) -> None:
        """Another recipe like the first, that serves under a name of its own."""
        self.recipe_path(name).write_text(self.recipe_path().read_text())
        self.edit(name, ollama={"name": name})

    def write_rows(self, rows: list[dict[str, Any]], name: str = "facts", **dump: Any) -> Path:
        path = self.root / "data" / f"{name}.json"
        path.write_text(json.dumps(rows, ensure_ascii=False, **dump))
        return path


def rows(count: int = 12) -> list[dict[str, Any]]:
    """Short alpaca rows, English and Chinese in turn."""
    english = [
        {"instruction": f"Say the number {n}.", "input": "", "output": f"Number {n}.", "history": []}
        for n in range(count)
    ]
    chinese = [
        {"instruction": f"请说数字{n}。", "input": "", "output": f"数字是{n}。", "history": []} for n in range(count)
    ]
    return [row for pair in zip(english, chinese, strict=True) for row in pair][:count]


def make_mini(folder: Path, base: Path | None = None) -> MiniProject:
    """A project with one data set of 12 rows and one recipe `mini`, whose base model is a copy of `base`, if any."""
    project = MiniProject(folder / "project", folder / "project" / "dagster_home")
    (project.root / "data").mkdir(parents=True)
    project.configs.mkdir()
    project.home.mkdir()
    (project.root / "pyproject.toml").write_text("")
    project.write_rows(rows())
    (project.root / "data" / "dataset_info.json").write_text(json.dumps({"facts": {"file_name": "facts.json"}}))
    recipe = {
        "dataset": {"dataset": ["facts"], "test_size": 2},
        "model": {"model_name_or_path": "./base"},
        "train": {"max_steps": 2, "per_device_train_batch_size": 4, "cutoff_len": 128, "learning_rate": 1e-3},
        "evaluate": {"max_new_tokens": 4},
        "ollama": {"name": "mini"},
    }
    project.recipe_path().write_text(yaml.safe_dump(recipe, sort_keys=False))
    if base is not None:
        shutil.copytree(base, project.root / "base")
    return project


@pytest.fixture
def mini(tmp_path: Path) -> MiniProject:
    """A project of one's own, without a base model."""
    return make_mini(tmp_path)
