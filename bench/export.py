"""How fast the export steps are, next to what a person would use instead, in one run on the demo's artifacts.

usage: python bench/export.py [RECIPE] [--rounds N]

- merge: against copying the base model's files, and against PEFT's merge_and_unload + save_pretrained
- q8_0: against the numpy quantiser of the gguf package

Each pair is measured in turn, N rounds; printed are the medians and the ratio of the medians. Every measurement is a
process of its own, so that peak memory (MB, resident, page cache of mapped files included) is that of the work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence

MERGE = (
    "from finetune_assets.export.merge import merge; "
    "merge(Path(a), Path(b), Path(out), export_size=5, export_dtype='auto')"
)
COPY = "import shutil; [shutil.copyfile(p, Path(out) / p.name) for p in Path(a).iterdir() if p.is_file()]"
PEFT = (
    "from transformers import AutoModelForCausalLM; from peft import PeftModel; import torch;"
    "m = AutoModelForCausalLM.from_pretrained(a, dtype='auto'); "
    "PeftModel.from_pretrained(m, b).merge_and_unload().save_pretrained(out)"
)
OURS_Q8 = "from finetune_assets.export.quantise import make_types; make_types(Path(a), ['q8_0'], Path(out), 'x')"
NUMPY_Q8 = (
    "import gguf, numpy as np\n"
    "for t in gguf.GGUFReader(a).tensors:\n"
    "    if len(t.shape) > 1:\n"
    "        rows = np.asarray(t.data, np.float32)\n"
    "        gguf.quantize(rows, gguf.GGMLQuantizationType.Q8_0).tofile(out + '/x')"
)
TIMER = """
import resource, sys, time
from pathlib import Path
a, b, out = sys.argv[1:4]
started = time.perf_counter()
{work}
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def measure(work: str, arguments: Sequence[str]) -> tuple[float, float]:
    """Seconds and peak memory (MB) of a piece of work in a fresh process; imports count, as a user waits for them."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-W", "ignore", "-c", TIMER.format(work=work), *arguments, out]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, memory = done.stdout.split()[-2:]
    return float(seconds), float(memory)


def compare(title: str, works: dict[str, str], arguments: Sequence[str], rounds: int) -> None:
    """Measure all works in turn, `rounds` times, and print medians and ratios to the first."""
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            figures[name].append(measure(work, arguments))
    print(f"\n{title}")
    first = statistics.median(seconds for seconds, _ in figures[next(iter(works))])
    for name, found in figures.items():
        seconds = statistics.median(seconds for seconds, _ in found)
        memory = statistics.median(memory for _, memory in found)
        print(f"  {name:<28}{seconds:8.2f} s{memory:9.0f} MB   time ratio of the first to this {first / seconds:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    listing = subprocess.run(
        [sys.executable, "-m", "finetune_assets.cli", "artifacts", options.recipe, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    paths = {name: entry["path"] for name, entry in json.loads(listing.stdout).items()}
    model = [paths["base_model"], paths["lora_adapter"]]
    compare("merge", {"ours, shard by shard": MERGE, "copying the files": COPY, "PEFT": PEFT}, model, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        source = f"{folder}/f32.gguf"
        convert = (
            "from finetune_assets.export.converter import convert; from finetune_assets.project import Project; "
            "convert(Path(a), Path(b), 'f32', Project.find().cache, name='bench')"
        )
        measure(convert, [paths["merged_model"], source])
        compare("f32 -> q8_0", {"ours": OURS_Q8, "gguf's numpy": NUMPY_Q8}, [source, "-"], options.rounds)


if __name__ == "__main__":
    main()
