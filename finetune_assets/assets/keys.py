"""What Dagster calls the nodes of a lineage, and the tags that say which versions of them were read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import PurePosixPath

import dagster as dg

from finetune_assets.assets.mount import HOME, Mount
from finetune_assets.lineage.readings import FILES, Reading
from finetune_assets.recipe import DATASETS, Recipe

DATA_VERSION = "dagster/data_version"
CODE_VERSION = "dagster/code_version"
READ = "dagster/input_data_version/"
PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,47}")  # recipe names that Dagster takes as they are
ASCII_OR_ONE = re.compile(r"[\x00-\x7f]+|[^\x00-\x7f]")
LONGEST_WORD = 60


def word_of(recipe: str) -> str:
    """What Dagster calls a recipe: its name, or where Dagster does not take it, ASCII and a digest that keeps it apart.

    `客服` is `u5ba2_u670d_` and six digits: Dagster takes ASCII letters, digits and '_' in every name. What people read
    (the command line, artifact folders, descriptions, the tag `recipe` of runs) has the name itself.
    """
    if PLAIN.fullmatch(recipe):
        return recipe
    spelt = "_".join(part if part.isascii() else f"u{ord(part):x}" for part in ASCII_OR_ONE.findall(recipe))
    word = re.sub(r"\W", "_", spelt, flags=re.ASCII)[:LONGEST_WORD]
    return f"{word}_{hashlib.sha256(recipe.encode('utf-8', 'surrogatepass')).hexdigest()[:6]}"


def stem(recipe: str, mount: Mount = HOME) -> str:
    """Return the beginning of the names of a recipe's job, sensors and schedule."""
    return "_".join([*(_word(part) for part in mount.prefix), word_of(recipe)])


def job_name(recipe: str, mount: Mount = HOME) -> str:
    """The job that brings every asset of a recipe up to date."""
    return f"{stem(recipe, mount)}_job"


def group_name(recipe: Recipe, mount: Mount = HOME) -> str:
    """Return the asset group of a recipe's assets."""
    return mount.group or stem(recipe.name, mount)


def chain_key(recipe: str, mount: Mount = HOME) -> list[str]:
    """Return the parts that the keys of all assets of a recipe begin with."""
    return [*mount.prefix, word_of(recipe)]


def asset_key(recipe: Recipe, asset: str, mount: Mount = HOME) -> dg.AssetKey:
    return dg.AssetKey([*chain_key(recipe.name, mount), asset])


def values_key(recipe: Recipe, asset: str, mount: Mount = HOME) -> dg.AssetKey:
    """The node of the recipe values that an asset reads."""
    return dg.AssetKey([*chain_key(recipe.name, mount), f"{asset}_config"])


def file_key(recipe: Recipe, dataset: str, mount: Mount = HOME) -> dg.AssetKey:
    """The node of a data set's file and registry entry: one for all recipes of this project that read it."""
    folder = PurePosixPath(recipe.dataset.dataset_dir)
    above = [] if folder == PurePosixPath("data") else [_word(part) for part in folder.parts or (".",)]
    chain = chain_key(recipe.name, mount) if mount.own_datasets else []
    return dg.AssetKey([*chain, DATASETS, *above, _word(dataset)])


def source_keys(recipe: Recipe, asset: str, mount: Mount = HOME) -> list[dg.AssetKey]:
    """The nodes that an asset reads beside its upstream assets."""
    files = recipe.dataset.dataset if asset == FILES else []
    return [values_key(recipe, asset, mount), *(file_key(recipe, name, mount) for name in files)]


def source_versions(recipe: Recipe, asset: str, reading: Reading, mount: Mount = HOME) -> dict[dg.AssetKey, str]:
    """The versions of those nodes."""
    files = {file_key(recipe, name, mount): digest for name, digest in reading.files.items()}
    return {values_key(recipe, asset, mount): reading.version, **files}


def read_tags(
    recipe: Recipe, asset: str, reading: Reading, upstreams: Mapping[str, str], mount: Mount = HOME
) -> dict[str, str]:
    """Provenance: the versions that were read, which Dagster's own last observation need not be.

    Args:
        upstreams: data version of every upstream asset.
    """
    versions = source_versions(recipe, asset, reading, mount)
    versions |= {asset_key(recipe, name, mount): version for name, version in upstreams.items()}
    return {READ + key.to_user_string(): version for key, version in versions.items()}


def _word(text: str) -> str:
    """A part of a key: Dagster takes letters, digits and '_'; other names keep apart by a digest."""
    word = re.sub(r"\W", "_", text, flags=re.ASCII)
    return word if word == text else f"{word}_{hashlib.sha256(text.encode()).hexdigest()[:6]}"
