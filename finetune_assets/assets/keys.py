"""What Dagster calls the nodes of a lineage, and the tags that say which versions of them were read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import PurePosixPath

import dagster as dg

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


def job_name(recipe: str) -> str:
    """The job that brings every asset of a recipe up to date."""
    return f"{word_of(recipe)}_job"


def asset_key(recipe: Recipe, asset: str) -> dg.AssetKey:
    return dg.AssetKey([word_of(recipe.name), asset])


def values_key(recipe: Recipe, asset: str) -> dg.AssetKey:
    """The node of the recipe values that an asset reads."""
    return dg.AssetKey([word_of(recipe.name), f"{asset}_config"])


def file_key(recipe: Recipe, dataset: str) -> dg.AssetKey:
    """The node of a data set's file and registry entry: one for all recipes that read it."""
    folder = PurePosixPath(recipe.dataset.dataset_dir)
    above = [] if folder == PurePosixPath("data") else [_word(part) for part in folder.parts or (".",)]
    return dg.AssetKey([DATASETS, *above, _word(dataset)])


def source_keys(recipe: Recipe, asset: str) -> list[dg.AssetKey]:
    """The nodes that an asset reads beside its upstream assets."""
    return [values_key(recipe, asset), *(file_key(recipe, name) for name in recipe.dataset.dataset if asset == FILES)]


def source_versions(recipe: Recipe, asset: str, reading: Reading) -> dict[dg.AssetKey, str]:
    """The versions of those nodes."""
    files = {file_key(recipe, name): digest for name, digest in reading.files.items()}
    return {values_key(recipe, asset): reading.version, **files}


def read_tags(recipe: Recipe, asset: str, reading: Reading, upstreams: Mapping[str, str]) -> dict[str, str]:
    """Provenance: the versions that were read, which Dagster's own last observation need not be.

    Args:
        upstreams: data version of every upstream asset.
    """
    versions = source_versions(recipe, asset, reading)
    versions |= {asset_key(recipe, name): version for name, version in upstreams.items()}
    return {READ + key.to_user_string(): version for key, version in versions.items()}


def _word(text: str) -> str:
    """A part of a key: Dagster takes letters, digits and '_'; other names keep apart by a digest."""
    word = re.sub(r"\W", "_", text, flags=re.ASCII)
    return word if word == text else f"{word}_{hashlib.sha256(text.encode()).hexdigest()[:6]}"
