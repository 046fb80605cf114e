"""A benchmark of quantisation, in time and memory, against llama.cpp's llama-quantize on as many threads.

usage: python -m bench.quantise [RECIPE] [--rounds N] [--billions B]

- f16 -> q8_0, f16 -> q4_k_m: from an f16 file converted from the recipe's merged model (make demo), else its base model
- with --billions also from a random file of that many billion weights, in the shape of Qwen2-1.5B
- Hugging Face folder -> f16, q8_0, q4_k_m, q6_k: the project's code in one process, against convert_hf_to_gguf.py and
  three runs of llama-quantize, of the same llama.cpp

bench/llama_tools.py builds llama-quantize from the pinned sources. The script measures each pair in turn, N rounds,
with the file in the page cache, and prints medians. Wall and CPU seconds are of whole processes, including imports.
"own" is the peak of private memory, and the figure to compare. "resident" adds the pages of mapped files, which the
system can free at any time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.llama_tools import llama_tool
from finetune_assets.export.gguf.converter import SCRIPT, converter_dir
from finetune_assets.export.gguf.quantise import MOST_WORKERS
from finetune_assets.recipe.project import Project

THREADS = min(os.cpu_count() or 1, MOST_WORKERS)
OURS = "import sys; from pathlib import Path; from finetune_assets.export.gguf.quantise import make_types; " + (
    "make_types(Path(sys.argv[1]), sys.argv[3:], Path(sys.argv[2]), 'x')"
)
OUR_CHAIN = "import sys; from pathlib import Path; from finetune_assets.export.gguf.converter import convert; " + (
    "from finetune_assets.export.gguf.quantise import make_types; out = Path(sys.argv[2]); "
    "convert(Path(sys.argv[1]), out / 'x-f16.gguf', 'f16', Path(sys.argv[3]), name='x'); "
    "make_types(out / 'x-f16.gguf', sys.argv[4:], out, 'x')"
)
MEMORY = r"(RssAnon|VmRSS):\s+(\d+) kB"  # in /proc/PID/status
Command = Sequence[str | Path]


@dataclass
class Cost:
    """The cost of commands that ran one after the other: the sum of seconds, and the maximum of memory (MB)."""

    wall: float = 0
    cpu: float = 0
    own: float = 0
    resident: float = 0


def measure(commands: Sequence[Command]) -> Cost:
    cost = Cost()
    for command in commands:
        os.sync()  # so that this command does not pay for earlier writes
        before = os.times()
        started = time.perf_counter()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        watcher = threading.Thread(target=_watch, args=(child.pid, cost))
        watcher.start()
        errors = child.communicate()[1]
        cost.wall += time.perf_counter() - started
        watcher.join()
        after = os.times()
        cost.cpu += after.children_user + after.children_system - before.children_user - before.children_system
        if child.returncode != 0:
            raise SystemExit(f"{' '.join(map(str, command))} failed\n{errors.decode(errors='replace')[-2000:]}")
    return cost


def _watch(process: int, cost: Cost) -> None:
    """Record the memory of a process and its descendants until it ends, 100 times a second."""
    while (sizes := _memory(process))[0]:
        cost.own = max(cost.own, sizes[0])
        cost.resident = max(cost.resident, sizes[1])
        time.sleep(0.01)


def _memory(process: int) -> tuple[float, float]:
    """Return own and resident MB of a process and its descendants; zeros once it has ended."""
    folder = Path(f"/proc/{process}")
    try:
        sizes = {name: int(size) for name, size in re.findall(MEMORY, (folder / "status").read_text())}
        children = [int(child) for file in folder.glob("task/*/children") for child in file.read_text().split()]
    except OSError:  # the process ended in the meantime
        return 0, 0
    parts = [(sizes.get("RssAnon", 0) / 1000, sizes.get("VmRSS", 0) / 1000), *map(_memory, children)]
    return sum(own for own, _ in parts), sum(resident for _, resident in parts)


def compare(title: str, works: Mapping[str, Callable[[Path], Sequence[Command]]], rounds: int) -> None:
    """Measure all works in turn, in reverse order in every other round, and print medians."""
    figures: dict[str, list[Cost]] = {name: [] for name in works}
    for number in range(rounds):
        for name in list(works)[:: 1 if number % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory() as out:
                figures[name].append(measure(works[name](Path(out))))
    print(f"\n{title}")
    first = statistics.median(cost.wall for cost in figures[next(iter(works))])
    for name, costs in figures.items():
        wall, cpu, own, resident = (
            statistics.median(getattr(cost, part) for cost in costs) for part in ("wall", "cpu", "own", "resident")
        )
        print(
            f"  {name:<24}{wall:8.2f} s wall{cpu:8.2f} s CPU{own:7.0f} MB own{resident:7.0f} MB resident"
            f"   wall of the first to this {first / wall:.2f}",
            flush=True,
        )


def llama_quantize(tool: Path, source: Path, out: Path, kind: str) -> Command:
    return [tool, source, out / f"{kind}.gguf", kind.upper(), str(THREADS)]


def compare_types(tool: Path, source: Path, rounds: int) -> None:
    for kind in ("q8_0", "q4_k_m"):
        works: dict[str, Callable[[Path], Sequence[Command]]] = {
            "ours": lambda out, kind=kind: [[sys.executable, "-c", OURS, source, out, kind]],
            "llama-quantize": lambda out, kind=kind: [llama_quantize(tool, source, out, kind)],
        }
        compare(f"f16 -> {kind}, a file of {source.stat().st_size / 1e6:.0f} MB, {THREADS} threads", works, rounds)


def make_large(path: Path, billions: float) -> None:
    """Write an f16 file in the shape of Qwen2-1.5B, with as many layers as the size needs; the weights repeat."""
    import gguf
    import numpy as np

    hidden, inner, shared, vocabulary = 1536, 8960, 256, 151936
    matrices = {
        "attn_q": (hidden, hidden), "attn_k": (shared, hidden), "attn_v": (shared, hidden),
        "attn_output": (hidden, hidden), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }  # fmt: skip
    in_layer = sum(rows * columns for rows, columns in matrices.values())
    layers = max(1, round((billions * 1e9 - vocabulary * hidden) / in_layer))
    block = (np.random.default_rng(0).standard_normal(vocabulary * hidden, np.float32) * 0.02).astype(np.float16)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_file_type(1)
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(12)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tensor("token_embd.weight", block.reshape(vocabulary, hidden))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(layers):
        for name, shape in matrices.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", block[: shape[0] * shape[1]].reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_a_process(work: Callable[..., None], *arguments: object) -> None:
    """Run work in a separate process: a child of a large process would start with its peak memory."""
    with multiprocessing.get_context("spawn").Pool(1) as maker:
        maker.apply(work, arguments)


def merged_or_base(recipe: str, folder: Path) -> Path:
    """Return the recipe's merged model; without one, download its base model into `folder`."""
    listing = subprocess.run(
        [sys.executable, "-m", "finetune_assets.cli", "artifacts", recipe, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    artifacts = json.loads(listing.stdout)
    if "merged_model" in artifacts:
        return Path(artifacts["merged_model"]["path"])
    print(f"{recipe} has no merged model yet: measuring its base model")
    in_a_process(fetch_base, recipe, folder)
    return folder


def fetch_base(recipe: str, folder: Path) -> None:
    from finetune_assets.models import base_model
    from finetune_assets.recipe.file import load_recipe, recipe_path

    project = Project.find()
    model = load_recipe(recipe_path(recipe, project.configs)).model
    folder.mkdir()
    base_model.fetch(model, project.root, project.cache, folder, lambda event: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--billions", type=float)
    options = parser.parse_args()
    cache = Project.find().cache
    tool = llama_tool("llama-quantize", cache)

    with tempfile.TemporaryDirectory() as folder:
        model = merged_or_base(options.recipe, Path(folder) / "base")
        source = Path(folder) / "f16.gguf"
        script = converter_dir(cache) / SCRIPT
        convert: Command = [sys.executable, script, model, "--outtype", "f16", "--outfile"]
        measure([[*convert, source]])
        compare_types(tool, source, options.rounds)
        kinds = ("q8_0", "q4_k_m", "q6_k")
        chains: dict[str, Callable[[Path], Sequence[Command]]] = {
            "ours": lambda out: [[sys.executable, "-c", OUR_CHAIN, model, out, cache, *kinds]],
            "llama.cpp's tools": lambda out: [
                [*convert, out / "f16.gguf"],
                *(llama_quantize(tool, out / "f16.gguf", out, kind) for kind in kinds),
            ],
        }
        compare(f"Hugging Face folder -> f16, {', '.join(kinds)}", chains, options.rounds)
        if options.billions:
            in_a_process(make_large, source, options.billions)
            compare_types(tool, source, options.rounds)


if __name__ == "__main__":
    main()
