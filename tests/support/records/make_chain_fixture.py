"""The maker of test_unmoved.py's fixture: a tiny project whose chain of eight assets has run once.

usage: python -m tests.support.records.make_chain_fixture

The archive shows that later code still calls the artifacts of COMMIT fresh, so moved or rewritten code is no reason to
make it again. Make it again only when a version changes on purpose: an asset's code version, or the version of a tool
that counts (docs/identity.md lists them). Do so in the commit that changes the version: delete the old archive, and set
COMMIT to the commit that it builds on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY, MiniProject, make_mini, shared_cache
from tests.support.export_fixtures import CHAT, tiny_base, tiny_tokenizer

COMMIT = "73e742e"  # HEAD when the archive was made
ARCHIVE = REPOSITORY / "tests" / "fixtures" / f"chain_{COMMIT}.tar.xz"
PARTS = ("pyproject.toml", "configs", "data", "base", "dagster_home/artifacts", "dagster_home/ollama")

# Fingerprints leave defaults out. Every asset reads other values here, and becomes stale if it stops reading one.
SECTIONS: dict[str, dict[str, Any]] = {
    "dataset": {"max_samples": 11, "val_size": 2, "test_size": 2, "seed": 7},
    "model": {"default_system": "Be brief."},
    "train": {"lora_rank": 2, "lora_alpha": 8, "lr_scheduler_type": "cosine", "warmup_steps": 1, "seed": 7},
    "evaluate": {"max_samples": 1, "per_device_eval_batch_size": 2},
    "export": {"export_dtype": "float16"},
    "gguf": {"types": ["f16", "q8_0", "q4_0"], "imatrix": "train", "max_kl": {"q4_0": 0.5}},
    "ollama": {"type": "q8_0", "types": ["f16"], "system": "Be brief, please.", "num_ctx": 512, "temperature": 0.5},
}


def make_project(folder: Path) -> MiniProject:
    """Make a project with a base model of 30,000 weights, and a recipe that has not run yet."""
    base = tiny_base(folder / "base", tied=True, hidden_size=32, intermediate_size=64)
    tiny_tokenizer(base)
    (base / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    project = make_mini(folder, base)
    project.edit("mini", **SECTIONS)
    project.cache.mkdir()
    (project.cache / "wheels").symlink_to(shared_cache() / "wheels")
    return project


def run(project: MiniProject) -> None:
    """Run the project's recipe by the command line."""
    places = {"FINETUNE_PROJECT": str(project.root), "DAGSTER_HOME": str(project.home), "PYTHONPATH": str(REPOSITORY)}
    environment = {key: value for key, value in os.environ.items() if key != "LLAMA_CPP_DIR"}  # the pinned converter
    command = [sys.executable, "-m", "finetune_assets.cli", "run", "mini"]
    subprocess.run(command, env={**environment, **places}, check=True)


def pack(project: MiniProject, file: Path) -> None:
    """Pack the files that the plan reads. Equal files give equal bytes, whatever their owners and dates."""
    with tarfile.open(file, "w:xz", preset=9) as archive:
        for part in PARTS:
            archive.add(project.root / part, part, filter=_anonymous)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if Path(member.name).name.startswith("."):  # lock files
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    return member


def main() -> None:
    """Make the archive, and report its size."""
    with tempfile.TemporaryDirectory() as folder:
        project = make_project(Path(folder))
        run(project)
        pack(project, ARCHIVE)
    print(f"{ARCHIVE.relative_to(REPOSITORY)}: {ARCHIVE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
