"""A benchmark of the export steps against their usual alternatives, on the demo's artifacts.

usage: python bench/export.py [RECIPE] [--rounds N]

- merge: against copying the base model's files (shutil.copyfile), and against PEFT's merge_and_unload + save_pretrained
- merge of 1.5B: random bf16 weights of Qwen2's shape in 4 shards, an adapter of rank 8 on every linear layer, against
  copying. Torch is imported before the clock starts, as in the project's worker, or within the time. Measured also
  until all files are on the disk (a run publishes nothing before that), and with files that are not in the page cache
- q8_0: against the numpy quantiser of the gguf package

The script measures the alternatives in turn, N rounds, and prints medians and their ratios to the first. Each
measurement has its own process, so that peak memory (MB, resident, with the page cache of mapped files) belongs to it
alone. Before the clock starts, the inputs are in the page cache, and the copy has been made once and deleted: a virtual
machine may have to request unused memory from its host, which takes longer than the copy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SHARDS = 4

COPY = "[shutil.copyfile(p, Path(out) / p.name) for p in Path(a).iterdir() if p.is_file()]"
READY = COPY + "; [p.unlink() for p in Path(out).iterdir()]\n"
TORCH = "import torch\n"
FORGET = (
    "for p in Path(a).iterdir():\n"
    "    os.fsync(f := os.open(p, os.O_RDONLY)); os.posix_fadvise(f, 0, 0, os.POSIX_FADV_DONTNEED)\n"
)
DURABLE = "; [os.fsync(os.open(p, os.O_RDONLY)) for p in Path(out).iterdir()]"
MERGE = (
    "from finetune_assets.export.merge.merge import merge; "
    "merge(Path(a), Path(b), Path(out), export_size=5, export_dtype='auto')"
)
MERGE_1B5 = MERGE.replace("export_size=5", "export_size=0.8")
PEFT = (
    "from transformers import AutoModelForCausalLM; from peft import PeftModel; import torch;"
    "m = AutoModelForCausalLM.from_pretrained(a, dtype='auto'); "
    "PeftModel.from_pretrained(m, b).merge_and_unload().save_pretrained(out)"
)
OURS_Q8 = "from finetune_assets.export.gguf.quantise import make_types; make_types(Path(a), ['q8_0'], Path(out), 'x')"
NUMPY_Q8 = (
    "import gguf, numpy as np\n"
    "for t in gguf.GGUFReader(a).tensors:\n"
    "    if len(t.shape) > 1:\n"
    "        rows = np.asarray(t.data, np.float32)\n"
    "        gguf.quantize(rows, gguf.GGMLQuantizationType.Q8_0).tofile(out + '/x')"
)
TIMER = """
import os, resource, shutil, sys, time
from pathlib import Path
a, b, out = sys.argv[1:4]
{before}started = time.perf_counter()
{work}
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def measure(work: str, arguments: Sequence[str], before: str = "") -> tuple[float, float]:
    """Return seconds and peak memory (MB) of a piece of work in a fresh process.

    The time includes its imports, because a user waits for them, but not the code in `before`.
    """
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-W", "ignore", "-c", TIMER.format(before=before, work=work), *arguments, out]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, memory = done.stdout.split()[-2:]
    return float(seconds), float(memory)


def compare(title: str, works: dict[str, tuple[str, str]], arguments: Sequence[str], rounds: int) -> None:
    """Measure all works (setup, timed code) in turn, `rounds` times and print medians and ratios."""
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, (before, work) in works.items():
            figures[name].append(measure(work, arguments, before))
    print(f"\n{title}")
    first = statistics.median(seconds for seconds, _ in figures[next(iter(works))])
    for name, measured in figures.items():
        seconds = statistics.median(seconds for seconds, _ in measured)
        memory = statistics.median(memory for _, memory in measured)
        print(f"  {name:<28}{seconds:8.2f} s{memory:9.0f} MB{seconds / first:8.2f} x the first")


def make_1b5(folder: Path) -> list[str]:
    """Write a base model and an adapter in the shape of Qwen2-1.5B; return their folders."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, shared, vocabulary, layers, rank = 1536, 8960, 256, 151936, 28, 8
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (shared, hidden),
        "self_attn.v_proj": (shared, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    torch.manual_seed(0)
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape).mul_(0.02)

    weight_map: dict[str, str] = {}
    lora: dict[str, torch.Tensor] = {}
    for number in range(SHARDS):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        tensors = {"model.norm.weight": random(hidden), "model.embed_tokens.weight": random(vocabulary, hidden)}
        tensors = tensors if number == 0 else {}
        for layer in range(number * layers // SHARDS, (number + 1) * layers // SHARDS):
            for name, (rows, width) in matrices.items():
                module = f"model.layers.{layer}.{name}"
                tensors[f"{module}.weight"] = random(rows, width)
                lora[f"base_model.model.{module}.lora_A.weight"] = random(rank, width)
                lora[f"base_model.model.{module}.lora_B.weight"] = random(rows, rank)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{name}.weight"] = random(hidden)
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, base / file)
        weight_map |= dict.fromkeys(tensors, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (base / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    save_file(lora, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return [str(base), str(adapter)]


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
    works = {
        "copying": (READY, COPY),
        "ours, torch imported": (TORCH + READY, MERGE),
        "ours": (READY, MERGE),
        "PEFT": (READY, PEFT),
    }
    compare("merge", works, model, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        # in a separate process: the peak memory of a child starts at the size of the process that starts it
        with multiprocessing.get_context("spawn").Pool(1) as maker:
            model = maker.apply(make_1b5, (Path(folder),))
        title = "merge of 1.5B in 4 shards"
        for conditions, ready, after in (
            ("", READY, ""),
            (", until it is on the disk", READY, DURABLE),
            (", from the disk", READY + FORGET, ""),
        ):
            works = {
                "copying": (ready, COPY + after),
                "ours, torch imported": (TORCH + ready, MERGE_1B5 + after),
                "ours": (ready, MERGE_1B5 + after),
            }
            compare(title + conditions, works, model, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        source = f"{folder}/f32.gguf"
        convert = (
            "from finetune_assets.export.gguf.converter import convert; "
            "from finetune_assets.recipe.project import Project; "
            "convert(Path(a), Path(b), 'f32', Project.find().cache, name='bench')"
        )
        measure(convert, [paths["merged_model"], source])
        works = {"gguf's numpy": ("", NUMPY_Q8), "ours": ("", OURS_Q8)}
        compare("f32 -> q8_0", works, [source, "-"], options.rounds)


if __name__ == "__main__":
    main()
