"""The project folder: its recipes, and the state under DAGSTER_HOME."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from finetune_assets.reporting.errors import BadInput


@dataclass(frozen=True)
class Project:
    """A folder with `configs/`; runs write everything below `home` (DAGSTER_HOME)."""

    root: Path
    home: Path

    @property
    def configs(self) -> Path:
        return self.root / "configs"

    @property
    def store(self) -> Path:
        """Return the folder of published artifacts, `<recipe>/<asset>/<fingerprint>/`."""
        return self.home / "artifacts"

    @property
    def cache(self) -> Path:
        """Return the folder of what can be downloaded or computed again: wheels, file digests."""
        return self.home / "cache"

    @property
    def ollama_models(self) -> Path:
        """Return the project's own Ollama model store, for `OLLAMA_MODELS`."""
        return self.home / "ollama" / "models"

    @classmethod
    def find(cls, start: Path | None = None) -> Project:
        """Find the project: FINETUNE_PROJECT, else the nearest folder at or above `start` that is a project.

        Falls back to the checkout that the package is installed from.

        Raises:
            BadInput: there is no project, or DAGSTER_HOME is not a folder.
        """
        named = os.environ.get("FINETUNE_PROJECT")
        here = (start or Path.cwd()).resolve()
        own = Path(__file__).resolve().parents[2]
        for root in [Path(named).absolute()] if named else [here, *here.parents, own]:
            if _is_project(root):
                return cls(root.resolve(), state_folder(root.resolve()))
        where = f"FINETUNE_PROJECT={named}" if named else f"neither {here} nor a folder above it"
        raise BadInput(
            f"no project found: {where} holds {'no ' if named else ''}configs/ and pyproject.toml",
            "change to the project folder, or set FINETUNE_PROJECT to it",
        )


def _is_project(root: Path) -> bool:
    try:
        return (root / "configs").is_dir() and (root / "pyproject.toml").is_file()
    except OSError:  # a path that the system cannot look up
        return False


def state_folder(root: Path, home: str | None = None) -> Path:
    """Return where a project's state is.

    Args:
        home: a folder, relative to the project; if not given, DAGSTER_HOME, else `dagster_home`.

    Raises:
        BadInput: it is not a folder.
    """
    setting = "home" if home else "DAGSTER_HOME"
    folder = root / (home or os.environ.get("DAGSTER_HOME") or "dagster_home")
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return folder.resolve()
    except FileNotFoundError:  # it is created when it is needed
        return folder.resolve()
    except OSError as error:
        raise BadInput(f"{setting}={folder}: {error.strerror}", f"set {setting} to a folder, or unset it") from None
