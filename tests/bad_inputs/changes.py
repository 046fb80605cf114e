"""What can be done to a project's folder."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.bad_inputs.case import Change


def recipe_text(text: str | bytes) -> Change:
    """The recipe file has this content."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return lambda root: _replace(root / "configs" / "mini.yaml", lambda file: file.write_bytes(data))


def recipe_value(section: str, key: str, value: str) -> Change:
    """The recipe has one key more or another value for it, written as in YAML."""

    def change(root: Path) -> None:
        file = root / "configs" / "mini.yaml"
        content = yaml.safe_load(file.read_text())
        content.setdefault(section, {})[key] = "@@"
        quoted = yaml.safe_dump(content, sort_keys=False)
        file.write_text(quoted.replace("'@@'", value), encoding="utf-8")

    return change


def text_file(name: str, content: str | bytes) -> Change:
    """A file of the project has this content."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")

    def change(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        _replace(root / name, lambda file: file.write_bytes(data))

    return change


def registry(value: Any) -> Change:
    return text_file("data/dataset_info.json", value if isinstance(value, str | bytes) else json.dumps(value))


def special(name: str, kind: str) -> Change:
    """Something that is not a regular file stands in a file's place."""

    def make(file: Path) -> None:
        match kind:
            case "fifo":
                os.mkfifo(file)
            case "folder":
                file.mkdir()
            case "dangling link":
                file.symlink_to("nowhere")
            case "link to itself":
                file.symlink_to(file.name)
            case "socket":
                here = Path.cwd()
                os.chdir(file.parent)  # such paths are short
                try:
                    with socket.socket(socket.AF_UNIX) as listener:
                        listener.bind(file.name)
                finally:
                    os.chdir(here)
            case device:
                file.symlink_to(device)

    def change(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        _replace(root / name, make)

    return change


SPECIAL = ("fifo", "folder", "dangling link", "link to itself", "socket", "/dev/zero", "/dev/null", "/dev/tty")


def base_file(name: str, content: str | bytes | None) -> Change:
    """The base model is a small folder in which one file has this content, or is missing."""

    def change(root: Path) -> None:
        base_folder(root)
        file = root / "base" / name
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))

    return change


def base_special(name: str, kind: str) -> Change:
    def change(root: Path) -> None:
        base_folder(root)
        special(f"base/{name}", kind)(root)

    return change


def base_folder(root: Path) -> None:
    """A Llama of next to nothing: enough for everything that looks at files only."""
    folder = root / "base"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(safetensors())
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 1, "vocab_size": 4, "intermediate_size": 8, "torch_dtype": "float32",
}  # fmt: skip


def safetensors(head: Any = None, data: bytes = bytes(128)) -> bytes:
    """A file of one tensor, or with another head."""
    if head is None:
        head = {"model.embed_tokens.weight": {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]}}
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + data


def _replace(file: Path, make: Callable[[Path], Any]) -> None:
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)
    make(file)
