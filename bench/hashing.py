"""A benchmark of the digest of a big file: the first time, against sha256sum and openssl, and from the cache.

usage: python bench/hashing.py [--gb N] [--rounds N] [--folder DIR]

Each round measures all programs, and every other round reverses the order. They are measured with the file dropped
from the page cache (as after a reboot), and with as much of it cached as fits (as after a download). The script writes
a file of N GB (default: 10) to DIR first, and prints medians, and the project's speed as a share of each program's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from finetune_assets.store.digests import DigestCache

BLOCK = 2**26
OURS = "ours, first reading"


def write(path: Path, size: int) -> None:
    """Write a file of `size` bytes that no disk can compress much."""
    block = os.urandom(BLOCK)
    with path.open("wb") as file:
        for start in range(0, size, BLOCK):
            file.write(block[: size - start])
        os.fsync(file.fileno())


def forget(path: Path) -> None:
    """Drop the file from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def first_reading(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        DigestCache(Path(folder) / "digests.sqlite").file(path)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(path: Path, works: dict[str, Callable[[], object]], rounds: int, *, cached: bool) -> None:
    """Measure all works in turn and print the medians."""
    figures: dict[str, list[float]] = {name: [] for name in works}
    if cached:
        first_reading(path)
    for number in range(rounds):
        for name in list(works) if number % 2 == 0 else reversed(works):
            if not cached:
                forget(path)
            figures[name].append(seconds(works[name]))
    print(f"\n{path.stat().st_size / 1e9:.1f} GB, {'in the page cache' if cached else 'from the disk'}")
    medians = {name: statistics.median(measured) for name, measured in figures.items()}
    for name, median in medians.items():
        ratio = "" if name == OURS else f"   our speed is {median / medians[OURS]:.2f} of this"
        print(f"  {name:<24}{median:8.2f} s{path.stat().st_size / median / 1e9:8.2f} GB/s{ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the file is written (default: the temporary folder)"
    )
    options = parser.parse_args()
    peers = {"sha256sum": ["sha256sum"], "openssl dgst": ["openssl", "dgst", "-sha256"]}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "big"
        write(path, int(options.gb * 1e9))
        works: dict[str, Callable[[], object]] = {OURS: partial(first_reading, path)}
        for name, command in peers.items():
            if shutil.which(command[0]):
                works[name] = partial(subprocess.run, [*command, path], check=True, stdout=subprocess.DEVNULL)
        for cached in (False, True):
            measure(path, works, options.rounds, cached=cached)
        cache = DigestCache(Path(folder) / "digests.sqlite")
        digest = cache.file(path)
        again = seconds(lambda: DigestCache(Path(folder) / "digests.sqlite").file(path))
        expected = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
        assert digest == expected, "sha256sum returned a different digest"
        print(f"\nunchanged, in another process's cache: {again * 1000:.1f} ms; the digest is sha256sum's")


if __name__ == "__main__":
    main()
