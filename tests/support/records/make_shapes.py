"""Ask llama.cpp's own quantiser about every model of shapes.py and hold ours against it.

usage: python -m tests.support.records.make_shapes [--write] [NAME...]

For each model and each type, with and without an importance matrix, llama-quantize and ours make a file; types, bytes
and metadata are compared. Then `llama-quantize COPY` copies our file, and both must be the same byte for byte.
llama-quantize is built from the pinned sources (see bench/llama_tools.py: it needs cmake and
a C++ compiler, or LLAMA_CPP_BIN). With --write its answers become data/shapes.json, which test_shapes.py reads. The
exit code is 1 if there was a difference.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.llama_tools import llama_tool
from finetune_assets.export.gguf.quantise import Imatrix, make_types
from finetune_assets.models.formats.gguf import read_head
from finetune_assets.recipe.gguf_types import FILE_TYPES, IMATRIX_TYPES
from finetune_assets.recipe.project import Project
from finetune_assets.store.digests import digest_of_file
from tests.support.records.shapes import BYTES, SHAPES, described_file, digest, digests, importance, in_form, joined

GIVES_UP = "no tensor type fallback is defined"
"""What llama-quantize says of rows that are no multiple of 32, in types other than K-quants; we write F16 there."""


def write_imatrix(imatrix: Imatrix, path: Path) -> Path:
    """The importance matrix as llama-imatrix writes one: sums of squares, and of how many."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_array("imatrix.datasets", [imatrix.dataset])
    writer.add_uint32("imatrix.chunk_count", imatrix.chunks)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in imatrix.values.items():
        writer.add_tensor(f"{name}.in_sum2", values * np.float32(4))
        writer.add_tensor(f"{name}.counts", np.full((len(values), 1), 4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_cpp_makes(tool: Path, source: Path, kind: str, target: Path, imatrix: Path | None) -> bool:
    """Have llama-quantize make `target`; False where it gives up."""
    weighed = ["--imatrix", imatrix.name] if imatrix else []
    command = [str(tool), *weighed, str(source), str(target), kind.upper(), "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=source.parent)
    if done.returncode != 0 and GIVES_UP not in done.stderr:
        raise SystemExit(f"{' '.join(command)} failed\n{done.stderr[-2000:]}")
    return done.returncode == 0


def copied(tool: Path, file: Path, target: Path) -> str:
    """Have llama-quantize copy a file, as Ollama does when it creates a model; the copy's sha256 (hex)."""
    done = subprocess.run([str(tool), str(file), str(target), "COPY"], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"llama-quantize cannot copy {file}\n{done.stderr[-2000:]}")
    return digest_of_file(target)


def differences(source: Path, ours: Path, theirs: Path, kind: str, weighed: bool) -> tuple[int, list[str]]:
    """Number of tensors compared, and what differs of two files made of `source`."""
    found: list[str] = []
    theirs_by_name = {tensor.name: tensor for tensor in read_head(theirs).tensors}
    our_digests, their_digests = digests(ours), digests(theirs)
    for tensor in read_head(ours).tensors:
        wanted = theirs_by_name.pop(tensor.name)
        if tensor.type != wanted.type:
            found.append(f"{tensor.name} is {tensor.type}, llama.cpp's is {wanted.type}")
        elif our_digests[tensor.name] != their_digests[tensor.name]:
            found.append(f"{tensor.name} ({tensor.type}) has other bytes")
    found += [f"{name} is missing" for name in theirs_by_name]
    # nothing is added to the metadata of a type that the matrix does not change
    linked, unweighed = ours.samefile(source), weighed and kind not in IMATRIX_TYPES
    if not linked and not unweighed and read_head(ours).raw != read_head(theirs).raw:
        found.append("other metadata")
    return len(our_digests), found


def ask(name: str, tool: Path, folder: Path) -> tuple[dict[str, str], dict[str, str], str, list[int]]:
    """llama.cpp's answers about one model: types and digest of each kind of file, a digest of all copies, and counts.

    Counted are tensors compared, differences, files that llama.cpp gives up, and copies. The key of an answer with an
    importance matrix ends in "weighed"; types that are the same without one are left out.
    """
    shape = SHAPES[name]
    source, theirs = in_form(shape, folder / "source.gguf"), folder / "theirs.gguf"
    imatrix = importance(shape)
    imatrix_file = write_imatrix(imatrix, folder / imatrix.file)
    types: dict[str, str] = {}
    contents: dict[str, str] = {}
    copies: list[str] = []
    compared = different = given_up = 0
    for kind in FILE_TYPES:
        for weighed in (False, True):
            title = f"{kind} weighed" if weighed else kind
            ours = make_types(source, [kind], folder, "ours", imatrix if weighed else None)[kind]
            copies.append(copied(tool, ours, folder / "copy.gguf"))
            if copies[-1] != digest_of_file(ours):
                print(f"DIFFERS {name}, {title}: the copy", flush=True)
                different += 1
            if not llama_cpp_makes(tool, source, kind, theirs, imatrix_file if weighed else None):
                given_up += 1
                continue
            number, found = differences(source, ours, theirs, kind, weighed)
            compared += number
            different += len(found)
            for line in found:
                print(f"DIFFERS {name}, {title}: {line}", flush=True)
            contents[title] = digest(theirs)
            if (made := described_file(source, theirs)) != types.get(kind):
                types[title] = made
    return types, contents, joined(copies), [compared, different, given_up, len(copies)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a model; all if none is given")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    tool = llama_tool("llama-quantize", Project.find().cache)
    reference: dict[str, dict[str, Any]] = {"types": {}, "bytes": {}, "copies": {}}
    totals = [0, 0, 0, 0]
    for name in options.names or SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            reference["types"][name], contents, reference["copies"][name], counts = ask(name, tool, Path(folder))
        if name in BYTES:
            reference["bytes"][name] = contents
        compared, different, given_up, copies = counts
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        refused = f", {given_up} files that llama.cpp gives up" if given_up else ""
        print(
            f"{name:<45} {compared - different:6} of {compared:6} tensors equal, {copies} copies{refused}", flush=True
        )
    print(f"{'all':<45} {totals[0] - totals[1]:6} of {totals[0]:6} tensors equal, {totals[2]} files given up")
    print(f"{totals[3]} files copied with COPY, {totals[1]} differences in all")
    if options.write:
        target = Path(__file__).parents[2] / "fixtures" / "shapes.json"
        target.write_text(json.dumps(reference, indent=1) + "\n")
    sys.exit(totals[1] > 0)


if __name__ == "__main__":
    main()
