"""Folders that are not models, and damaged files in them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bad_inputs.case import BASE, DEEP, LONG, Case, Change
from tests.bad_inputs.changes import SPECIAL, base_file, base_folder, base_special, recipe_value, safetensors


def base_models() -> Iterator[Case]:
    """Folders that are no models, and files in them that are not what they should be."""
    names = ("base", "config.json", "safetensors", "tokenizer")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        for kind in SPECIAL:
            yield Case("base model", f"{name} is a {kind}", (name, "base"), base_special(name, kind), BASE)
    for name in ("/", "~", "..", ".", "../..", "/etc", "/dev", "/proc", "~root", "./nowhere", "/nowhere", "a b",
            "a/b/c", "", "-", "http://x/y", "pypi:x", "pypi:x==1/y",
                 "pypi:x==1/../y.gguf", "pypi:../x==1/y.gguf", "./data", "configs/mini.yaml", "base\\n", "客服/模型",
                 "x" * 5000, "a//b", "owner/..", "a\\u0000b"):  # fmt: skip
        yield Case(
            "base model",
            f"named {name[:30]!r}",
            ("model", "base"),
            recipe_value("model", "model_name_or_path", f'"{name}"'),
            BASE,
        )
    configs: list[str | bytes | None] = [None, "", "null", "[]", "12", '"x"', "{", "[" * DEEP, '{"a":' * DEEP,
            f'{{"vocab_size": {LONG}}}', b"\xff\xfe", "\0",
                                         '{"architectures": "\\ud800"}', b'{"architectures": ["a\xff"]}']  # fmt: skip
    for content in configs:
        yield Case(
            "base model",
            f"config.json {content if content is None else content[:20]!r}",
            ("config.json",),
            base_file("config.json", content),
            BASE,
        )
    good = safetensors()
    for at in (0, 1, 7, 8, 9, 20, 60, len(good) - 129, len(good) - 128, len(good) - 64, len(good) - 1):
        yield Case(
            "base model", f"weights cut after {at} bytes", names, base_file("model.safetensors", good[:at]), BASE
        )
    entry = {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]}
    heads: list[Any] = [b"", b"null", b"[]", b"12", b"{", b"[" * DEEP, b'{"a":' * DEEP, b"\xff", b'{"a": NaN}',
            b'{"a": ' + LONG.encode() + b"}", {"a": 1}, {"a": None}, {"a": []}, {"a": {}}]  # fmt: skip
    for key, bad in (("dtype", [1, None, "F99", []]), ("shape", [1, None, "x", [-4, 8], [4.5, 8], ["4", 8], [10**30,
            8]]),
                     ("data_offsets", [1, None, [], [0], [0, 1, 2], ["a", "b"], [-1, 128], [0, 10**30], [128, 0],
                     [0, 64], [1, 129]])):  # fmt: skip
        heads += [{"model.embed_tokens.weight": entry | {key: value}} for value in bad]
    for head in heads:
        shown = head if isinstance(head, bytes) else json.dumps(head).encode()
        yield Case("base model", f"head {shown[:60]!r}", names, base_file("model.safetensors", safetensors(head)), BASE)
    yield Case(
        "base model",
        "a head of 2^63 bytes",
        names,
        base_file("model.safetensors", struct.pack("<Q", 1 << 63) + b"{}"),
        BASE,
    )
    yield Case(
        "base model",
        "an LFS pointer",
        names,
        base_file("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
        BASE,
    )
    for index in ("", "null", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}',
            '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": "nowhere.safetensors"}}',
                  '{"weight_map": {"a": "/etc/passwd"}}', "[" * DEEP, "\xff", '{"weight_map": {}}',
                  f'{{"weight_map": {LONG}}}', '{"weight_map": {"a": "\\u0000"}}'):  # fmt: skip
        yield Case("base model", f"index {index[:40]!r}", names, base_file("model.safetensors.index.json", index), BASE)
    for pickle in ("pytorch_model.bin", "model.pt", "model.ckpt"):
        yield Case("base model", f"only {pickle}", names, _only(pickle), BASE)


def _only(name: str) -> Change:
    def change(root: Path) -> None:
        base_folder(root)
        (root / "base" / "model.safetensors").rename(root / "base" / name)

    return change
