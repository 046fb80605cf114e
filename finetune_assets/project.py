"""Where things are: the project folder, its recipes, and the state under DAGSTER_HOME."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from finetune_assets.errors import BadInput


@dataclass(frozen=True)
class Project:
    """A folder with `configs/`; everything that runs make lands under `home` (DAGSTER_HOME)."""

    root: Path
    home: Path

    @property
    def configs(self) -> Path:
        return self.root / "configs"

    @property
    def store(self) -> Path:
        """Published artifacts: `<recipe>/<asset>/<fingerprint>/`."""
        return self.home / "artifacts"

    @property
    def cache(self) -> Path:
        """What can be fetched or computed again: wheels, file digests."""
        return self.home / "cache"

    @property
    def ollama_models(self) -> Path:
        """Our own Ollama model store; a server started with this OLLAMA_MODELS serves it."""
        return self.home / "ollama" / "models"

    @classmethod
    def find(cls, start: Path | None = None) -> Project:
        """The project of `FINETUNE_PROJECT`, else of the nearest folder above `start` with configs/ and data/.

        Falls back to the checkout that this package was installed from.

        Raises:
            BadInput: no such folder.
        """
        named = os.environ.get("FINETUNE_PROJECT")
        here = (start or Path.cwd()).resolve()
        candidates = [Path(named).resolve()] if named else [here, *here.parents, Path(__file__).resolve().parent.parent]
        for root in candidates:
            if (root / "configs").is_dir() and (root / "pyproject.toml").is_file():
                home = Path(os.environ.get("DAGSTER_HOME") or root / "dagster_home")
                return cls(root, home if home.is_absolute() else (root / home).resolve())
        raise BadInput(
            f"no project found: neither {here} nor a folder above it holds configs/ and pyproject.toml",
            "change into the project's folder, or set FINETUNE_PROJECT to it",
        )
