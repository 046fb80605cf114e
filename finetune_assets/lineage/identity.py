"""The fingerprint of an asset: its code version, recipe values, sources, tools, and its upstreams' content."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic_core import PydanticUndefined

from finetune_assets.lineage.node import Node
from finetune_assets.recipe import Recipe, Section
from finetune_assets.store.artifact import Artifact, Fingerprint

# How a plan shows an ingredient that an earlier release did not read, or that this one no longer reads.
NOT_RECORDED, NO_LONGER_READ = "not recorded", "no longer read"


def fingerprint(
    node: Node, recipe: Recipe, upstreams: Mapping[str, Artifact], sources: Mapping[str, str]
) -> Fingerprint:
    """Return the fingerprint of the artifact that is made from these inputs.

    Args:
        upstreams: the artifact of every upstream asset.
        sources: digests of what the asset reads from outside the lineage.
    """
    versions = {
        f"{up.asset}/{part}" if part else up.asset: version
        for up in node.upstreams
        for part, version in _versions(upstreams[up.asset], up.parts(recipe) if up.parts else None)
    }
    return Fingerprint({"asset": node.name, "upstreams": versions, **own_ingredients(node, recipe, sources)})


def own_ingredients(node: Node, recipe: Recipe, sources: Mapping[str, str]) -> dict[str, Any]:
    """Return the ingredients of a fingerprint, except the upstreams' content."""
    return {
        "code_version": node.code_version,
        "recipe": recipe_values(node, recipe),
        "sources": dict(sources),
        "tools": dict(node.tools()),
    }


def recipe_values(node: Node, recipe: Recipe) -> dict[str, Any]:
    """Return `section.key` -> value, for the keys that the node reads and whose value is not the default.

    Defaults are omitted, so that writing one into a recipe changes nothing, nor does a key that a later release adds.
    A release that changes a default gives the node a new code version.
    """
    values: dict[str, Any] = {}
    for read in node.reads:
        name, _, key = read.partition(".")
        section: Section = getattr(recipe, name)
        for field in [key] if key else type(section).model_fields:
            value = getattr(section, field)
            if value != default(section, field):
                values[f"{name}.{field}"] = value
    return values


def default(section: Section, field: str) -> Any:
    """Return the default value of a section's key; PydanticUndefined if a recipe must give it."""
    return type(section).model_fields[field].get_default(call_default_factory=True)


def value_then(past: Artifact, recipe: Recipe, key: str) -> Any:
    """Return the value that a recipe key had when an artifact was made."""
    section, _, field = key.partition(".")
    return past.manifest["ingredients"]["recipe"].get(key, default(getattr(recipe, section), field))


def differences(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    recipe: Recipe,
    look: Callable[[str, str], str | None] = lambda kind, key: None,
) -> list[str]:
    """Describe how the ingredients of two fingerprints differ: `train.learning_rate 5e-05 -> 0.0001`.

    Args:
        look: ("sources" or "upstreams", key) -> description of what changed inside, or None if that is unknown.
    """
    reasons: list[str] = []
    for key, before, after in _changed(old, new, "recipe", lambda key: _default_of(key, recipe)):
        was = NOT_RECORDED if before is PydanticUndefined else shown(before)
        reasons.append(f"{key} {was} -> {NO_LONGER_READ if after is PydanticUndefined else shown(after)}")
    for kind, name in (("sources", "source"), ("upstreams", "upstream")):
        for key, before, after in _changed(old, new, kind):
            if before is None or after is None:
                reasons.append(f"{name} {key} is {'new' if before is None else 'gone'}")
            else:
                inside = look(kind, key)
                reasons.append(f"{name} {key}: {inside}" if inside else f"{name} {key} changed")
    for key, before, after in _changed(old, new, "tools"):
        reasons.append(f"{key} {before or NOT_RECORDED} -> {after or NO_LONGER_READ}")
    if old.get("code_version") != new["code_version"]:
        reasons.append(f"code version {old.get('code_version')} -> {new['code_version']}")
    return reasons


def shown(value: Any) -> str:
    """Return a recipe value as it is written in a recipe."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(str, value)) + "]"
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _versions(artifact: Artifact, parts: tuple[str, ...] | None) -> list[tuple[str, str]]:
    if parts is None:
        return [("", artifact.data_version)]
    return [(part, artifact.part_version(part)) for part in parts]


def _changed(
    old: Mapping[str, Any], new: Mapping[str, Any], kind: str, absent: Callable[[str], Any] = lambda key: None
) -> list[tuple[str, Any, Any]]:
    """Return key, value before and value after, of the ingredients of one kind that differ."""
    both = old.get(kind, {}), new[kind]
    triples = [(key, *(values.get(key, absent(key)) for values in both)) for key in sorted({*both[0], *both[1]})]
    return [(key, before, after) for key, before, after in triples if before != after]


def _default_of(key: str, recipe: Recipe) -> Any:
    name, _, field = key.partition(".")
    section: Section | None = getattr(recipe, name, None)
    return default(section, field) if section is not None and field in type(section).model_fields else None
