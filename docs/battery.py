"""Printer of docs/battery.md: harms done to the model of a finished project, and the check that finds each.

usage: python -m docs.battery RECIPE [> docs/battery.md]
Run the recipe first (`make demo`). The harms are done to copies in a temporary folder (3 GB for the demo). Where there
is an Ollama program (PATH, OLLAMA_BIN), models are also put on a temporary server. The fixed texts of the page are
constants and `head`: tests/whole/test_pages.py compares them with the page.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from finetune_assets.export.gguf.converter import convert
from finetune_assets.export.gguf.quantise import make_types
from finetune_assets.export.ollama import create as ollama_create
from finetune_assets.export.ollama import model_store as ollama_store
from finetune_assets.export.ollama.expected_answer import expected
from finetune_assets.export.ollama.modelfile import OllamaModel
from finetune_assets.export.ollama.publish import recorded
from finetune_assets.export.ollama.served_checks import in_store
from finetune_assets.export.ollama.server.api import show
from finetune_assets.export.ollama.server.temporary import find_binary, serving
from finetune_assets.export.parity import merged as merge_check
from finetune_assets.export.parity.checks.structure import check_file
from finetune_assets.export.parity.limits import MAX_KL, judge
from finetune_assets.export.parity.prove import Reference, examine, refer
from finetune_assets.lineage.plan import open_store
from finetune_assets.machine.cores import cores
from finetune_assets.machine.device import choose_device
from finetune_assets.models.formats.gguf import read_head
from finetune_assets.recipe.gguf_types import FILE_TYPES
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.store.artifact import Artifact
from finetune_assets.store.digests import DigestCache, digest_of_file
from tests.support.corruptions.files import PUBLISHED_HARMS, flip
from tests.support.corruptions.gguf_files import GGUF_HARMS, LOUD_HARMS, WORD_HARMS
from tests.support.corruptions.harm import GGUF, MERGED, PUBLISHED, SERVER, STORE, named
from tests.support.corruptions.merged_models import MERGED_HARMS
from tests.support.corruptions.served import NASTY, served_harms, slip

HEAD = """# The corruption battery

Printed by `python -m docs.battery {recipe}`. Each harm is done alone, to a copy of the finished project's model, and
the checks on its way report what they find. *Caught by* names the check that is there for this harm; other checks that
found it stand in brackets. `tests/export/parity/test_battery.py` does the same to tiny models of several architectures.

- *{merged}*: the comparison with base and adapter that ends merged_model.
- *{gguf}*: the proof that ends gguf_file, here of a {kind} file.
- *{published}*: the digests of its manifest. Every plan and `finetune verify` compare them; a file that has changed is
  made again.
- *{store}*: `finetune verify` reads every byte of it.
- *{server}*: a model that a real server made from something other than what was asked for. It is checked before it
  takes the production name; `finetune verify` checks what is served in the same way.

A flipped bit of a weight changes too little for any limit. An unquantised file is therefore compared with the merged
model bit by bit (`weights`), and every file with what was written (`bytes`, `artifact`, `blobs`).
"""
LIMITS = """
## What wrong weights do to the KL divergence

In nats per token, compared with the limit of the type. One wrong layer may stay below the limit of a coarse type, so KL
does not prove weights. The check `weights` does: it found each of these harms.
"""
TYPES = """
## All types of a good file

Every check except `kl` passes for each type. {points} positions of held-out conversations are compared. The limits are
the defaults of gguf.max_kl. Tokens per second are of decoding on the machine that printed this page, with {cores} CPU
thread(s).
"""
HARMS = ("harm", "place", "caught by", "in its words")
COLUMNS = ("type", "MB", "KL", "limit", "verdict", "top-1 agreement", "perplexity ratio", "tokens/s", "proof, s")
ROWS = {"q8_0", "q4_k_m"}  # of the table of KL divergences
WIDTH = 150  # characters of what a check says


def head(recipe: str, kind: str) -> str:
    """Return the beginning of the page.

    Args:
        kind: GGUF type of the file that is harmed.
    """
    places = {"merged": MERGED, "gguf": GGUF, "published": PUBLISHED, "store": STORE, "server": SERVER}
    return HEAD.format(recipe=recipe, kind=kind, **places)


def row(*cells: object) -> None:
    """Print a line of a table."""
    print("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |", flush=True)


def table(*names: str) -> None:
    print()
    row(*names)
    row(*("---" for _ in names))


def harmed(name: str, place: str, wanted: str, said: dict[str, str]) -> None:
    """Print a line of the battery; exit if the check that must find the harm does not find it."""
    if wanted not in said:
        raise SystemExit(f"{name} in {place}: {wanted} did not find it; found by {said or 'nothing'}")
    others = ", ".join(check for check in said if check != wanted)
    words = said[wanted]
    shown = words if len(words) <= WIDTH else words[:WIDTH] + "..."
    row(name, place, f"**{wanted}**" + (f" ({others})" if others else ""), shown)


@contextmanager
def copied(path: Path, folder: Path) -> Iterator[Path]:
    """Yield a copy of a file or folder; delete it afterwards."""
    copy = folder / path.name
    shutil.copytree(path, copy) if path.is_dir() else shutil.copyfile(path, copy)
    try:
        yield copy
    finally:
        shutil.rmtree(copy) if path.is_dir() else copy.unlink(missing_ok=True)


def merged_weights(base: Path, adapter: Path, merged: Path, held_out: Path, folder: Path) -> None:
    for harm in MERGED_HARMS:
        with copied(merged, folder) as broken:
            harm.strike(broken)
            said: dict[str, str] = {}
            try:
                merge_check.check(base, adapter, broken, held_out, choose_device(kind="cpu"))
            except StepFailed as error:
                lines = error.message.replace(str(folder) + "/", "").splitlines()
                for check in named(error):
                    words = next((line for line in lines if line.startswith(f"  check {check}: ")), lines[-1])
                    said[check] = words.partition(": ")[2] if words.startswith("  check") else words
            harmed(harm.name, MERGED, harm.check, said)


def gguf_file(good: Path, kind: str, reference: Reference, folder: Path) -> None:
    digest = digest_of_file(good)
    for harm in (*GGUF_HARMS, *(WORD_HARMS if read_head(good).get("tokenizer.ggml.model") == "gpt2" else ())):
        with copied(good, folder) as broken:
            harm.strike(broken)
            figures, failures = examine(broken, reference)
            failures = [*check_file(broken, digest)[1], *failures, *(judge(kind, figures, {}) if figures else [])]
            said: dict[str, str] = {}
            for failure in failures:
                words = f"{failure.measured}, allowed: {failure.allowed}".replace(str(folder) + "/", "")
                said.setdefault(failure.check, words)
            harmed(harm.name, GGUF, harm.check, said)


def published(artifact: Artifact, asset: str, folder: Path) -> None:
    file = max(artifact.manifest["files"], key=lambda name: artifact.manifest["files"][name]["size"])
    for harm in PUBLISHED_HARMS:
        with copied(artifact.path, folder) as copy:
            harm.strike(copy / file)
            damage = Artifact(copy, artifact.manifest).damage(DigestCache(None))
            harmed(harm.name, f"{PUBLISHED}: {asset}", harm.check, {"artifact": damage} if damage else {})


def our_store(model: OllamaModel, folder: Path) -> None:
    for kind in ("model", "template", "system", "params"):
        (made,) = ollama_store.write(folder / "store", [model]).values()
        (digest,) = [layer.digest for layer in made.layers if layer.kind == kind]
        blob = ollama_store.blob_path(folder / "store", digest)
        shutil.copyfile(blob, blob.with_suffix(".own"))  # the weights are a link to the artifact's
        blob.with_suffix(".own").replace(blob)
        flip(blob)
        said = {check.name: check.found for check in in_store(folder / "store", model, made.digest) if not check.ok}
        harmed(f"one bit of the {kind} flipped", STORE, "blobs", said)
        shutil.rmtree(folder / "store")


def server(model: OllamaModel, folder: Path) -> None:
    other = Path(shutil.copyfile(model.gguf, folder / "other.gguf"))
    GGUF_HARMS[0].strike(other)
    create = ollama_create._create
    with serving(folder / "models") as host:
        replies = {model.name: expected(model)}
        ollama_create.create(host, [model], replies)
        for harm in served_harms(other):
            create_harmed = slip(host, harm, create)
            said: dict[str, str] = {}
            with mock.patch.object(ollama_create, "_create", create_harmed):
                try:
                    ollama_create.create(host, [model], replies)
                except StepFailed as error:
                    found = error.message.partition("as it was made: ")[2]
                    said = {part.partition(": ")[0]: part.partition(": ")[2] for part in found.split("; ")}
            harmed(harm.name, SERVER, harm.check, said)
        assert show(host, model.name)["system"] == NASTY
        row(
            "none: a system prompt with triple quotes and braces",
            SERVER,
            "nothing",
            f"served as `{NASTY!r}`",
        )


def distributions(files: dict[str, Path], reference: Reference, folder: Path) -> None:
    kinds = [kind for kind in files if kind in ROWS]
    table("weights", *kinds)
    row("limit", *(MAX_KL[kind] for kind in kinds))
    good = [examine(files[kind], reference)[0] for kind in kinds]
    row("right", *(f"{figures.kl:.2g}" for figures in good if figures))
    for harm in LOUD_HARMS:
        found = []
        for kind in kinds:
            with copied(files[kind], folder) as broken:
                harm.strike(broken)
                figures, _ = examine(broken, reference)
                found.append("does not run" if figures is None else f"{figures.kl:.2g}")
        row(harm.name, *found)


def all_types(files: dict[str, Path], reference: Reference) -> None:
    table(*COLUMNS)
    for kind, file in files.items():
        started = time.monotonic()
        figures, failures = examine(file, reference, sha256=digest_of_file(file))
        seconds = time.monotonic() - started
        if failures or figures is None:
            raise SystemExit(f"{kind}, which is good, is accused: {failures}")
        verdict = "too coarse" if judge(kind, figures, {}) else "passes"
        size, limit = f"{file.stat().st_size / 1e6:.1f}", f"{MAX_KL[kind]:g}"
        shares = f"{figures.top1:.1%}", f"{figures.ppl_ratio:.3f}", figures.tokens_per_second, f"{seconds:.1f}"
        row(kind, size, f"{figures.kl:.2g}", limit, verdict, *shares)


def main(recipe: str) -> None:
    project = Project.find()
    store = open_store(project)
    names = ("base_model", "lora_adapter", "merged_model", "dataset_info", "gguf_file", "ollama_model")
    made = {name: store.current(recipe, name) for name in names}
    there = {name: artifact for name, artifact in made.items() if artifact is not None}
    if len(there) < len(made):
        raise SystemExit(f"{recipe} is not finished: finetune run {recipe}")
    path = {name: artifact.path for name, artifact in there.items()}
    held_out = path["dataset_info"] / "test.jsonl"
    facts = there["ollama_model"].metrics
    model = next(iter(recorded({**facts, "system": NASTY}, path["gguf_file"]).values()))
    kind = "q8_0" if "q8_0" in there["gguf_file"].metrics["types"] else next(iter(there["gguf_file"].metrics["types"]))
    good = path["gguf_file"] / there["gguf_file"].metrics["types"][kind]["file"]
    print(head(recipe, kind))
    with tempfile.TemporaryDirectory(prefix="battery-") as temporary:
        folder = Path(temporary)
        table(*HARMS)
        merged_weights(path["base_model"], path["lora_adapter"], path["merged_model"], held_out, folder)
        reference = refer(path["merged_model"], held_out, choose_device(kind="cpu"))
        gguf_file(good, kind, reference, folder)
        for asset in ("lora_adapter", "merged_model", "gguf_file", "ollama_model"):
            published(there[asset], asset, folder)
        our_store(model, folder)
        if find_binary() is not None:
            server(model, folder)
        else:
            print("no Ollama here: its server was left out", file=sys.stderr)
        full = folder / f"{recipe}-f32.gguf"
        convert(path["merged_model"], full, "f32", project.cache, name=recipe)
        files = {"f32": full, **make_types(full, [kind for kind in FILE_TYPES if kind != "f32"], folder, recipe)}
        print(LIMITS)
        (folder / "harmed").mkdir()
        distributions(files, reference, folder / "harmed")
        print(TYPES.format(points=len(reference.points), cores=cores()))
        all_types(files, reference)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit((__doc__ or "").split("\n\n")[1])
    os.environ["HF_HUB_OFFLINE"], os.environ["TRANSFORMERS_VERBOSITY"] = "1", "error"
    main(sys.argv[1])
