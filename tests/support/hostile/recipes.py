"""Recipes that are wrong in every way we know: what to put into configs/, and words that the refusal must say."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

GOOD = """\
dataset: {dataset: facts}
model: {model_name_or_path: ./base}
ollama: {name: NAME}
"""
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{now}: &{now} [{','.join([f'*{before}'] * 9)}]\n" for before, now in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{now}: &{now} {{<<: [{','.join([f'*{before}'] * 9)}]}}\n"
    for before, now in zip("abcdefgh", "bcdefghi", strict=True)
)

# Content of the file -> what the message says in addition to its name.
TEXTS: dict[str, tuple[str | bytes, str]] = {
    "date": ("model: {model_revision: 2024-02-30}\n", ":1: model.model_revision: 2024-02-30 reads as a date"),
    "timestamp": ("x: !!timestamp x\n", ":1: x: x reads as a date: put it in quotes"),
    "int": ("train: {seed: !!int abc}\n", ":1: train.seed: abc is not !!int"),
    "float": ("train: {seed: !!float abc}\n", ":1: train.seed: abc is not !!float"),
    "bool": ("train: {seed: !!bool abc}\n", ":1: train.seed: abc is not !!bool"),
    "null_tag": ("- !!set {a}\n", "!!set"),
    "binary": ("x: !!binary '%%%'\n", ":1: x: %%% reads as a binary value"),
    "digits": (f"train:\n  seed: {'9' * 5000}\n", ":2: train.seed: a number of 5000 characters (limit 100)"),
    "hexadecimal": (f"train:\n  seed: 0x{'f' * 5000}\n", ":2: train.seed: a number of 5002 characters"),
    "python": ("x: !!python/object/apply:os.system ['touch marker']\n", ":1: x: a list with the tag !!python/object"),
    "python_name": ("x: !!python/name:os.system\n", "!!python/name:os.system"),
    "own_tag": ("x: !thing 1\n", ":1: x: 1 reads as a value with the tag !thing"),
    "equals": ("x: =\n", ":1: x: = reads as a lone '='"),
    "recursive": ("dataset: &d [*d]\n", ":1: dataset.0: the alias refers to a value that contains it"),
    "recursive_map": ("dataset: &d {a: *d}\n", ":1: dataset.a: the alias refers to"),
    "recursive_merge": ("dataset: &d {<<: *d}\n", "the alias refers to"),
    "deep": ("[" * 50_000, "nested more than 20 levels deep"),
    "deep_map": ("".join(f"{' ' * n}a:\n" for n in range(400)), "nested more than 20 levels deep"),
    "deep_a_bit": ("x: " + "[" * 25 + "]" * 25 + "\n", ":1: nested more than 20 levels deep"),
    "bomb": (BOMB, "more than 10000 keys and values"),
    "merge_bomb": (MERGES, "more than 10000 keys and values"),
    "merge_word": ("<<: x\n", "expected a mapping"),
    "merge_list": ("dataset: {<<: [1, 2]}\n", "expected a mapping"),
    "list_key": ("? [a, b]\n: c\n", ":1: ?: a key must be a text"),
    "map_key": ("? {a: b}\n: c\n", "a key must be a text"),
    "number_key": ("1: c\n", ":1: 1: a key must be a text"),
    "true_key": ("train: {yes: c}\n", ":1: train.yes: a key must be a text"),
    "null_key": ("~: c\n", ":1: ~: a key must be a text"),
    "nul": (b"dataset: \0\n", ":1: not valid YAML: contains the character U+0000"),
    "escape": (b"dataset: \x1b[31m\n", "contains the character U+001B"),
    "nul_escape": ('dataset: {dataset_dir: "a\\0b"}\n', ":1: dataset.dataset_dir: the text contains a NUL character"),
    "surrogate": ('ollama: {system: "\\ud800"}\n', ":1: ollama.system: the text contains a lone surrogate"),
    "huge_escape": ('ollama: {system: "\\UFFFFFFFF"}\n', "not valid YAML"),
    "bytes": (b"dataset: \xff\xfe\n", ":1: not UTF-8 (byte 9)"),
    "utf16": ("dataset: x\n".encode("utf-16"), "not UTF-8 but UTF-16"),
    "utf16_without_mark": ("dataset: x\n".encode("utf-16-le"), "contains the character U+0000"),
    "two_documents": ("a: 1\n---\nb: 2\n", "expected a single document"),
    "empty": ("", "a recipe is a mapping of sections"),
    "comment": ("# nothing\n", "a recipe is a mapping of sections"),
    "null": ("null\n", "a recipe is a mapping of sections"),
    "scalar": ("just words\n", "a recipe is a mapping of sections"),
    "tabs": ("dataset:\n\tdataset: x\n", "not valid YAML"),
    "unclosed": ("dataset: [\n", "not valid YAML"),
    "unknown_alias": ("dataset: *nobody\n", "undefined alias"),
    "directive": ("%YAML 9.9\n---\na: 1\n", "incompatible"),
    "large": ("#" * 10_000_000, "has 10.0 MB (limit 256.0 kB)"),
    "many_keys": ("".join(f"k{n}: 1\n" for n in range(20_000)), "more than 10000 keys and values"),
    "many_unknown": ("".join(f"k{n}: 1\n" for n in range(4_000)), "... and more like these"),
    "long_key": ("k" * 100_000 + ": 1\n", "not valid YAML"),
    "infinite": ("train: {learning_rate: .inf}\n", ":1: train.learning_rate: input should be a finite number"),
    "nan": ("train: {learning_rate: .nan}\n", "train.learning_rate: input should be a finite number"),
    "word_nan": ("train: {learning_rate: 'nan'}\n", "train.learning_rate: input should be a finite number"),
    "true": ("train: {learning_rate: true}\n", "train.learning_rate: must be a number, not true"),
    "no": ("train: {lora_rank: no}\n", "train.lora_rank: must be a number, not false"),
    "true_kl": ("gguf: {max_kl: {q8_0: true}}\n", "gguf.max_kl: must be a number"),
    "half_row": ("dataset: {test_size: 1.5}\n", "dataset.test_size: cannot hold out 1.5 rows"),
    "negative": ("dataset: {val_size: -1}\n", "dataset.val_size: input should be greater than or equal to 0"),
    "huge": (f"train: {{cutoff_len: 1{'0' * 90}}}\n", "train.cutoff_len: is too large (limit 4294967296)"),
    "huge_float": ("train: {warmup_steps: 1.0e+300}\n", "train.warmup_steps: is too large (limit 4294967296)"),
    "huge_word": (f"dataset: {{test_size: '1{'0' * 400}'}}\n", "dataset.test_size: input should be a finite number"),
    "seed": ("train: {seed: -1}\n", "train.seed: input should be greater than or equal to 0"),
    "nameless": ("dataset: {dataset: ['']}\n", "dataset.dataset: the name of a data set must have 1 to 200 characters"),
    "cron": ("schedule: {cron: '0 99 * * *'}\n", "schedule.cron: '0 99 * * *' is not a valid cron expression"),
    "cron_never": ("schedule: {cron: '0 0 30 2 *'}\n", "schedule.cron: '0 0 30 2 *' names a day that does not"),
    "zone": ("schedule: {execution_timezone: '../../etc/passwd'}\n", "schedule.execution_timezone: unknown time zone"),
    "a b": (GOOD.replace("NAME", "space"), "use letters, digits, '_' and '-' only, not ' '"),
    "a.b": (GOOD.replace("NAME", "dot"), "use letters, digits, '_' and '-' only, not '.'"),
    "9lives": (GOOD.replace("NAME", "nine"), "it must begin with a letter"),
    "-rf": (GOOD.replace("NAME", "option"), "it must begin with a letter"),
    "x" * 49: (GOOD.replace("NAME", "long"), "it has 49 characters (limit 48)"),
    "😀": (GOOD.replace("NAME", "face"), "it must begin with a letter"),
    "a\u202eb": (GOOD.replace("NAME", "bidi"), "not '\\u202e'"),
    "new\nline": (GOOD.replace("NAME", "line"), "not '\\n'"),
    "datasets": (GOOD.replace("NAME", "datasets"), "is reserved for the group of the data sets"),
}  # fmt: skip


def _folder(path: Path) -> None:
    path.mkdir()


def _socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # a socket's address has at most about 100 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


# What is no file -> how to make it, and what is said of it.
THINGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a_folder": (_folder, "is a folder, not a file"),
    "a_pipe": (lambda path: os.mkfifo(path), "is a named pipe, not a file"),
    "a_socket": (_socket, "is a socket, not a file"),
    "a_device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
    "a_terminal": (lambda path: path.symlink_to("/dev/tty"), "not a file"),
    "gone": (lambda path: path.symlink_to("nowhere.yaml"), "is a link to nowhere.yaml, which does not exist"),
    "a_ring": (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels of symbolic links"),
}  # fmt: skip


def put(configs: Path, kind: str) -> tuple[Path, str]:
    """Make one of them; its path, and what must be said of it."""
    path = configs / f"{kind}.yaml"
    if kind in TEXTS:
        content, words = TEXTS[kind]
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    else:
        make, words = THINGS[kind]
        make(path)
    return path, words


KINDS = (*TEXTS, *THINGS)
