"""An immutable copy of the source files of a recipe's data sets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from finetune_assets.data.registry import REGISTRY, data_file, load_entries
from finetune_assets.store.digests import DigestCache, digest_of, digest_of_source


def source_digests(folder: Path, names: list[str], digests: DigestCache) -> dict[str, str]:
    """Return data set name -> digest of its registry entry and the bytes of its file, which identify the source.

    Raises:
        BadInput: the registry or a file is missing or invalid.
    """
    entries = load_entries(folder, names)
    return {
        name: digest_of([entry.model_dump(exclude={"file_name"}), digest_of_source(data_file(folder, entry), digests)])
        for name, entry in entries.items()
    }


def take(folder: Path, names: list[str], out: Path) -> dict[str, Any]:
    """Copy the files of the named data sets into `out`, with a registry; return the metrics of the manifest.

    Raises:
        BadInput: as source_digests.
    """
    registry: dict[str, Any] = {}
    files: list[dict[str, Any]] = []
    for index, (name, entry) in enumerate(load_entries(folder, names).items()):
        source = data_file(folder, entry)
        # numbered: two data sets may share a file, or have files of the same name in different folders
        copy = out / f"{index:02d}-{source.name}"
        shutil.copyfile(source, copy)
        registry[name] = {**entry.model_dump(exclude_unset=True), "file_name": copy.name}
        files.append({"dataset": name, "file": entry.file_name, "bytes": copy.stat().st_size})
    (out / REGISTRY).write_text(json.dumps(registry, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return {"datasets": files}
