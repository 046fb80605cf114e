"""A benchmark of the overhead of a run: the time of `finetune run` on a tiny model, less that of its steps.

usage: python bench/overhead.py [--rounds N]

The script builds all assets N times, with a random two-layer model and the demo's tokenizer, and no stand-ins. Wall
time less the seconds in the manifests is the overhead: start, Dagster, plans, locks, digests, fsync, publication. It
hardly depends on the model, so it is also printed as a share of the demo's run. Run `make demo` first. Manifests
record tenths of seconds, so the error is at most 0.4 s.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # for the tests' projects
FINETUNE = (sys.executable, "-m", "finetune_assets.cli")


def seconds_at_work(artifacts: Mapping[str, Mapping[str, str]]) -> dict[str, float]:
    """Asset -> seconds that its body took, by the manifests of what `finetune artifacts --json` lists."""
    manifests = {
        name: json.loads((Path(item["path"]) / "manifest.json").read_text()) for name, item in artifacts.items()
    }
    return {name: manifest["seconds"] for name, manifest in manifests.items()}


def finetune(*words: str, environment: Mapping[str, str] | None = None) -> dict:
    done = subprocess.run(
        [*FINETUNE, *words, "--json"],
        env={**os.environ, **(environment or {})},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    from tests.conftest import make_mini
    from tests.support.tiny_model import tiny_model

    demo = finetune("artifacts", "demo")
    figures: list[tuple[float, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        tiny_model(Path(demo["base_model"]["path"]), base)
        for number in range(options.rounds):
            project = make_mini(Path(folder) / str(number), base)
            project.cache.mkdir()
            (project.cache / "wheels").symlink_to(REPOSITORY / "dagster_home" / "cache" / "wheels")
            environment = {"FINETUNE_PROJECT": str(project.root), "DAGSTER_HOME": str(project.home)}
            started = time.perf_counter()
            made = finetune("run", "mini", environment=environment)
            figures.append((time.perf_counter() - started, seconds_at_work(made["artifacts"])))
    print("a chain from nothing on a tiny model, seconds")
    for wall, work in figures:
        inside = sum(work.values())
        each = ", ".join(f"{name} {seconds:.1f}" for name, seconds in work.items())
        print(f"  wall {wall:6.1f}   at work {inside:6.1f}   beside {wall - inside:5.1f}   ({each})")
    beside = statistics.median(wall - sum(work.values()) for wall, work in figures)
    share = statistics.median((wall - sum(work.values())) / wall for wall, work in figures)
    whole = sum(seconds_at_work(demo).values()) + beside
    print(f"beside the work: {beside:.1f} s")
    print(f"  of the tiny chain's run  {share:.1%}")
    print(f"  of the demo's run        {beside / whole:.1%} ({whole:.0f} s, its steps' work and as much beside it)")


if __name__ == "__main__":
    main()
