"""The Dagster names of a lineage's nodes, their place, and the tags with the versions that an asset read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import dagster as dg

from finetune_assets.lineage.readings import FILES, Reading
from finetune_assets.recipe import DATASETS, Recipe

DATA_VERSION = "dagster/data_version"
CODE_VERSION = "dagster/code_version"
READ = "dagster/input_data_version/"
PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,47}")  # recipe names that Dagster accepts unchanged
ASCII_OR_ONE = re.compile(r"[\x00-\x7f]+|[^\x00-\x7f]")
LONGEST_WORD = 60


@dataclass(frozen=True)
class Mount:
    """How a recipe's chain stands in a Dagster project. The defaults are those of this repository's own project.

    Args:
        prefix: parts of every asset key before the recipe's name; jobs, sensors and schedules begin with them too.
        group: the asset group of the eight assets; the recipe's name if not given.
        owners: of every node, in place of the default ones.
        tags: of every node, besides its own.
        gpu: the key of the resource that says where to compute.
        own_datasets: the data sets are nodes of this chain alone, not shared with other recipes.
        read: reads the recipe as it is now; not given, its file in `configs/` is read.
    """

    prefix: tuple[str, ...] = ()
    group: str | None = None
    owners: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    gpu: str = "gpu"
    own_datasets: bool = False
    read: Callable[[], Recipe] | None = None


OWNERS = ("team:fine-tuning",)
HOME = Mount()
"""The project that loads the recipes of its own `configs/`."""


def word_of(recipe: str) -> str:
    """Return a recipe's name for Dagster: its own name or, if Dagster rejects that, an ASCII form with a digest.

    `客服` becomes `u5ba2_u670d_` and six digits: Dagster accepts ASCII letters, digits and '_' in names. The command
    line, artifact folders, descriptions and the tag `recipe` of runs have the original name.
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
    """Return the name of the job that brings every asset of a recipe up to date."""
    return f"{stem(recipe, mount)}_job"


def group_name(recipe: Recipe, mount: Mount = HOME) -> str:
    """Return the asset group of a recipe's assets."""
    return mount.group or stem(recipe.name, mount)


def chain_key(recipe: str, mount: Mount = HOME) -> list[str]:
    """Return the parts that the keys of all assets of a recipe begin with."""
    return [*mount.prefix, word_of(recipe)]


def asset_key(recipe: Recipe, asset: str, mount: Mount = HOME) -> dg.AssetKey:
    """Return the key of an asset of a recipe."""
    return dg.AssetKey([*chain_key(recipe.name, mount), asset])


def values_key(recipe: Recipe, asset: str, mount: Mount = HOME) -> dg.AssetKey:
    """Return the key of the node with the recipe values that an asset reads."""
    return dg.AssetKey([*chain_key(recipe.name, mount), f"{asset}_config"])


def file_key(recipe: Recipe, dataset: str, mount: Mount = HOME) -> dg.AssetKey:
    """Return the key of a data set's node, which all recipes of the project that read the data set share.

    The node stands for the data set's file and its registry entry."""
    folder = PurePosixPath(recipe.dataset.dataset_dir)
    above = [] if folder == PurePosixPath("data") else [_word(part) for part in folder.parts or (".",)]
    chain = chain_key(recipe.name, mount) if mount.own_datasets else []
    return dg.AssetKey([*chain, DATASETS, *above, _word(dataset)])


def source_keys(recipe: Recipe, asset: str, mount: Mount = HOME) -> list[dg.AssetKey]:
    """Return the keys of the nodes that an asset reads besides its upstream assets."""
    files = recipe.dataset.dataset if asset == FILES else []
    return [values_key(recipe, asset, mount), *(file_key(recipe, name, mount) for name in files)]


def source_versions(recipe: Recipe, asset: str, reading: Reading, mount: Mount = HOME) -> dict[dg.AssetKey, str]:
    """Return the version of each node of `source_keys`."""
    files = {file_key(recipe, name, mount): digest for name, digest in reading.files.items()}
    return {values_key(recipe, asset, mount): reading.version, **files}


def read_tags(
    recipe: Recipe, asset: str, reading: Reading, upstreams: Mapping[str, str], mount: Mount = HOME
) -> dict[str, str]:
    """Return the provenance tags: the versions that were read, which may differ from Dagster's last observation.

    Args:
        upstreams: upstream asset -> its data version.
    """
    versions = source_versions(recipe, asset, reading, mount)
    versions |= {asset_key(recipe, name, mount): version for name, version in upstreams.items()}
    return {READ + key.to_user_string(): version for key, version in versions.items()}


def _word(text: str) -> str:
    """Return a part of a key. Dagster accepts letters, digits and '_'; any other name is changed and gets a digest."""
    word = re.sub(r"\W", "_", text, flags=re.ASCII)
    return word if word == text else f"{word}_{hashlib.sha256(text.encode()).hexdigest()[:6]}"
