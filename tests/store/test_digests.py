"""The digest cache: no edit goes unseen, unchanged bytes are read once, and a damaged database is thrown away."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from finetune_assets.lineage.materialise import Step, materialise
from finetune_assets.recipe.file import load_recipe
from finetune_assets.reporting.errors import BadInput, StepFailed
from finetune_assets.store import digests
from finetune_assets.store.artifact import Made
from finetune_assets.store.digests import DigestCache, digest_of_file
from tests.conftest import MiniProject
from tests.support.history_fixtures import make_chain, plan_of, stand_in, store_of


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def old(path: Path, content: bytes) -> Path:
    """A file whose digest can be remembered at once."""
    path.write_bytes(content)
    time.sleep(2 * digests.FINE / 1e9)
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read for a digest."""
    seen: list[str] = []
    read = digests._digest

    def count(file, path: Path) -> str:
        seen.append(path.name)
        return read(file, path)

    monkeypatch.setattr(digests, "_digest", count)
    return seen


def overwrite(path: Path, content: bytes) -> None:
    """In place, as `rsync --inplace` and editors do: the inode stays."""
    with path.open("r+b") as file:
        file.write(content)


def with_touch(path: Path, reference: Path) -> None:
    overwrite(path, b"two")
    subprocess.run(["touch", "-r", reference, path], check=True)


def with_cp(path: Path, reference: Path) -> None:
    other = reference.with_name("other")
    other.write_bytes(b"two")
    subprocess.run(["touch", "-r", reference, other], check=True)
    subprocess.run(["cp", "-p", other, path], check=True)


def with_a_new_inode(path: Path, reference: Path) -> None:
    with_cp(path.with_name("new"), reference)
    path.with_name("new").replace(path)


@pytest.mark.parametrize("edit", [with_touch, with_cp, with_a_new_inode])
def test_an_edit_that_keeps_size_and_modification_time(tmp_path: Path, edit: Callable[[Path, Path], None]):
    path = old(tmp_path / "file", b"one")
    reference = tmp_path / "reference"
    shutil.copy2(path, reference)
    before = path.stat()
    assert DigestCache(tmp_path / "d.sqlite").file(path) == sha256(b"one")
    edit(path, reference)
    after = path.stat()
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    assert DigestCache(tmp_path / "d.sqlite").file(path) == sha256(b"two")


def dated_by(tick: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the file system date files by a clock that ticks so rarely (ns)."""
    stat = os.fstat

    def ticking(handle: int) -> os.stat_result:
        found = stat(handle)
        dates = {name: getattr(found, name) // tick * tick for name in ("st_mtime_ns", "st_ctime_ns")}
        return os.stat_result(found[:10], {**dates, "st_dev": found.st_dev, "st_ino": found.st_ino})

    monkeypatch.setattr(os, "fstat", ticking)


def test_an_edit_in_the_tick_of_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Files are dated by a clock that ticks every few ms: equal times do not mean equal bytes."""
    dated_by(10_000_000, monkeypatch)
    path, cache = tmp_path / "file", DigestCache(tmp_path / "d.sqlite")
    for number in range(100):
        for content in (b"%04d" % number, b"%04d" % (number + 5000)):
            path.write_bytes(content)
            assert cache.file(path) == sha256(content)


def test_whole_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]):
    """A file system that dates by the second: what was changed within two is not trusted."""
    dated_by(10**9, monkeypatch)
    path, cache = old(tmp_path / "file", b"one"), DigestCache(tmp_path / "d.sqlite")
    cache.file(path)
    overwrite(path, b"two")
    assert cache.file(path) == sha256(b"two")
    time.sleep(3)
    for _ in range(3):
        assert cache.file(path) == sha256(b"two")
    assert len(reads) == 3, "remembered once it is old"


def test_a_date_in_the_future_costs_nothing(tmp_path: Path, reads: list[str]):
    path, cache = old(tmp_path / "file", b"one"), DigestCache(tmp_path / "d.sqlite")
    os.utime(path, (2**32, 2**32))
    time.sleep(2 * digests.FINE / 1e9)
    for _ in range(3):
        cache.file(path)
    assert reads == ["file"]


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, cache = old(tmp_path / "file", b"one"), DigestCache(tmp_path / "d.sqlite")
    read = digests._digest

    def slow(file, at: Path) -> str:
        digest = read(file, at)
        overwrite(path, b"two")
        return digest

    monkeypatch.setattr(digests, "_digest", slow)
    cache.file(path)
    monkeypatch.setattr(digests, "_digest", read)
    assert cache.file(path) == DigestCache(tmp_path / "d.sqlite").file(path) == sha256(b"two")


def test_a_new_hard_link_is_one_reading_more(tmp_path: Path, reads: list[str]):
    path = old(tmp_path / "file", b"one")
    DigestCache(tmp_path / "d.sqlite").file(path)
    os.link(path, tmp_path / "link")
    time.sleep(2 * digests.FINE / 1e9)
    for _ in range(3):
        cache = DigestCache(tmp_path / "d.sqlite")
        assert cache.file(path) == cache.file(tmp_path / "link") == sha256(b"one")
    assert reads == ["file", "file"]


def test_plans_after_each_other_read_nothing_again(mini: MiniProject, reads: list[str]):
    """Published files are remembered at once; those that our Ollama store links to are read again by that step."""
    made = make_chain(mini)
    assert (made["gguf_file"].path / "mini-f16.gguf").stat().st_nlink == 2
    assert (reads.count("mini-f16.gguf"), reads.count("mini-q8_0.gguf")) == (2, 1)
    reads.clear()
    for _ in range(2):
        assert {item.state for item in plan_of(mini).values()} == {"fresh"}
    assert not reads
    assert made["gguf_file"].damage(store_of(mini).digests) is None and not reads


def test_an_edit_of_a_published_file_that_keeps_its_times(mini: MiniProject):
    made = make_chain(mini)["merged_model"]
    plan_of(mini)
    path = made.path / "weights.json"
    before = path.stat()
    overwrite(path, b"#")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = plan_of(mini)["merged_model"]
    assert found.reasons == ("the content of weights.json has changed since it was published",)


def test_an_input_that_changes_while_it_is_read(mini: MiniProject):
    make_chain(mini, upto="base_model")
    made = make_chain(mini, upto="dataset_info")
    recipe = load_recipe(mini.recipe_path())

    def harm(step: Step) -> Made:
        overwrite(made["dataset_info"].path / "train.jsonl", b"#")
        return stand_in(step)

    with pytest.raises(
        StepFailed, match=r"mini/dataset_info was changed while it was read: the content of train\.jsonl"
    ):
        materialise("lora_adapter", recipe, mini, harm, lambda event: None)
    assert not store_of(mini).published("mini", "lora_adapter")


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flipped(file: Path) -> None:
    """One digit of a digest is another one: sqlite does not notice."""
    content, digest = file.read_bytes(), sha256(b"one").encode()
    assert content.count(digest) == 1
    file.write_bytes(content.replace(digest, digest[:-1] + (b"0" if digest[-1:] != b"0" else b"1")))


def sql(*lines: str) -> Callable[[Path], None]:
    def run(file: Path) -> None:
        with closing(sqlite3.connect(file, isolation_level=None)) as db:
            for line in lines:
                db.execute(line)

    return run


def instead(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def run(file: Path) -> None:
        file.unlink()
        make(file)

    return run


def full_folder(file: Path) -> None:
    file.mkdir()
    (file / "precious").write_text("kept")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "not a database": lambda file: file.write_bytes(b"this is no database" * 100),
    "empty": lambda file: file.write_bytes(b""),
    "truncated": truncated,
    "a flipped bit": flipped,
    "a head alone": lambda file: os.truncate(file, 100),
    "zeros": lambda file: file.write_bytes(bytes(8192)),
    "another schema": sql("DROP TABLE known", "CREATE TABLE known (a, b)"),
    "a view": sql("DROP TABLE known", "CREATE VIEW known AS SELECT 1 AS inode"),
    "a number": sql("UPDATE known SET stamp = 1"),
    "null": sql("UPDATE known SET digest = NULL"),
    "a blob": sql("UPDATE known SET digest = x'00ff'"),
    "no UTF-8": sql("UPDATE known SET digest = CAST(x'ff' AS TEXT)"),
    "not a digest": sql("UPDATE known SET digest = 'abc'"),
    "another file's digest": sql(f"UPDATE known SET digest = '{sha256(b'two')}'"),
    "a folder": instead(Path.mkdir),
    "a folder with files": instead(full_folder),
    "a fifo": instead(os.mkfifo),
    "a link to nothing": instead(lambda file: file.symlink_to("nowhere")),
    "a link to itself": instead(lambda file: file.symlink_to(file)),
    "a device": instead(lambda file: file.symlink_to("/dev/zero")),
    "a folder in the journal's place": lambda file: file.with_name(file.name + "-journal").mkdir(),
    "a journal of garbage": lambda file: file.with_name(file.name + "-journal").write_bytes(os.urandom(4096)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_database(tmp_path: Path, damage: Callable[[Path], object], reads: list[str]):
    """No failure, no wrong digest, and the next cache remembers again."""
    path, file = old(tmp_path / "file", b"one"), tmp_path / "d.sqlite"
    DigestCache(file).file(path)
    damage(file)
    assert DigestCache(file).file(path) == sha256(b"one")
    reads.clear()
    assert DigestCache(file).file(path) == sha256(b"one")
    assert not reads
    kept = tmp_path / "set-aside-d.sqlite" / "precious"
    assert kept.read_text() == "kept" if damage is DAMAGE["a folder with files"] else not kept.exists()


def test_a_database_of_an_earlier_release(tmp_path: Path):
    """It had one table of another name, and its stamps had no time of change."""
    path, file = old(tmp_path / "file", b"one"), tmp_path / "d.sqlite"
    found = path.stat()
    sql("CREATE TABLE digests (inode TEXT PRIMARY KEY, stamp TEXT, digest TEXT)")(file)
    row = f"'{found.st_dev}:{found.st_ino}', '{found.st_size}:{found.st_mtime_ns}', '{sha256(b'two')}'"
    sql(f"INSERT INTO digests VALUES ({row})")(file)
    assert DigestCache(file).file(path) == sha256(b"one")


def test_a_locked_database_is_waited_for_once_and_kept(tmp_path: Path):
    path, file = old(tmp_path / "file", b"one"), tmp_path / "d.sqlite"
    DigestCache(file).file(path)
    others = [old(tmp_path / str(number), b"more") for number in range(5)]
    with closing(sqlite3.connect(file, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        cache = DigestCache(file)
        assert [cache.file(one) for one in (path, *others)] == [sha256(b"one"), *[sha256(b"more")] * 5]
        assert time.monotonic() - began < 3
    with closing(sqlite3.connect(file)) as db:
        assert db.execute("SELECT digest FROM known").fetchall() == [(sha256(b"one"),)]


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "a file").write_text("")
    path = old(tmp_path / "file", b"one")
    assert DigestCache(tmp_path / "a file" / "d.sqlite").file(path) == sha256(b"one")


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["fifo", "folder"])
def test_what_cannot_be_read_is_named(tmp_path: Path, make: Callable[[Path], None]):
    path = tmp_path / "odd"
    make(path)
    for read in (digest_of_file, DigestCache(None).file, DigestCache(tmp_path / "d.sqlite").file):
        with pytest.raises(OSError, match="odd"):
            read(path)


def test_a_source_that_cannot_be_read_is_named(mini: MiniProject, monkeypatch: pytest.MonkeyPatch):
    (mini.root / "base").mkdir()
    (mini.root / "base" / "config.json").write_text("{}")
    opened = os.open

    def refuse(path, *arguments, **named) -> int:
        if str(path).endswith("base/config.json"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(BadInput, match=r".*/base/config\.json: cannot be read: Permission denied"):
        plan_of(mini)
