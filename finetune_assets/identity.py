"""The fingerprint of an asset: its code version, the recipe values it reads, its sources, its upstreams' content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_assets.artifacts import Artifact, Fingerprint
from finetune_assets.lineage import Node
from finetune_assets.recipe import Recipe, Section


def fingerprint(
    node: Node, recipe: Recipe, upstreams: Mapping[str, Artifact], sources: Mapping[str, str]
) -> Fingerprint:
    """What the asset's artifact is called if it is made of these inputs.

    Args:
        upstreams: the artifact of every upstream asset.
        sources: digests of what the asset reads from outside the lineage.
    """
    return Fingerprint(
        {
            "asset": node.name,
            "code_version": node.code_version,
            "recipe": recipe_values(node, recipe),
            "sources": dict(sources),
            "upstreams": {
                f"{up.asset}/{part}" if part else up.asset: version
                for up in node.upstreams
                for part, version in _versions(upstreams[up.asset], up.parts(recipe) if up.parts else None)
            },
            "tools": dict(node.tools()),
        }
    )


def recipe_values(node: Node, recipe: Recipe) -> dict[str, Any]:
    """`section.key` -> value, for the keys that the node reads and whose value is not the default.

    Defaults are left out so that spelling one out, or a new key that a later release brings, changes nothing. A
    release that changes a default gives the node a new code version.
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
    """The value of a section's key when the recipe does not give it."""
    return type(section).model_fields[field].get_default(call_default_factory=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """In words, what distinguishes two fingerprints' ingredients: `train.learning_rate 5e-05 -> 0.0001`."""
    reasons: list[str] = []
    for key in sorted({*old["recipe"], *new["recipe"]}):
        before, after = (values["recipe"].get(key, _default_of(key, recipe)) for values in (old, new))
        if before != after:
            reasons.append(f"{key} {shown(before)} -> {shown(after)}")
    for kind, name in (("sources", "source "), ("upstreams", "upstream ")):
        for key in sorted({*old[kind], *new[kind]}):
            before, after = old[kind].get(key), new[kind].get(key)
            if before != after:
                change = "is new" if before is None else "is gone" if after is None else "changed"
                reasons.append(f"{name}{key} {change}")
    for key in sorted({*old["tools"], *new["tools"]}):
        before, after = old["tools"].get(key), new["tools"].get(key)
        if before != after:
            reasons.append(f"{key} {shown(before)} -> {shown(after)}")
    if old["code_version"] != new["code_version"]:
        reasons.append(f"code version {old['code_version']} -> {new['code_version']}")
    return reasons


def shown(value: Any) -> str:
    """A recipe value as one writes it in a recipe."""
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


def _default_of(key: str, recipe: Recipe) -> Any:
    name, _, field = key.partition(".")
    section: Section | None = getattr(recipe, name, None)
    return default(section, field) if section is not None and field in type(section).model_fields else None
