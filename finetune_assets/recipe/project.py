"""Where things are: the project folder, its recipes, and the state under DAGSTER_HOME."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from finetune_assets.reporting.errors import BadInput


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
            BadInput: no such folder, or DAGSTER_HOME cannot be a folder.
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
            "change into the project's folder, or set FINETUNE_PROJECT to it",
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
        BadInput: it cannot be a folder.
    """
    setting = "home" if home else "DAGSTER_HOME"
    folder = root / (home or os.environ.get("DAGSTER_HOME") or "dagster_home")
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return folder.resolve()
    except FileNotFoundError:  # it is made when it is needed
        return folder.resolve()
    except OSError as error:
        raise BadInput(f"{setting}={folder}: {error.strerror}", f"set {setting} to a folder, or unset it") from None
