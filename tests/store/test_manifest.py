"""Manifests: those of earlier releases are read, and any damage makes a foreign entry, whoever reads it."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from finetune_assets.assets.all_assets import STEPS
from finetune_assets.assets.step_asset import page
from finetune_assets.cli import history, tables
from finetune_assets.cli.results import print_results
from finetune_assets.export.ollama.publish import digests_of, recorded, serving_problem
from finetune_assets.lineage.ancestry import ancestry
from finetune_assets.lineage.estimate import costs
from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.plan import make_plan
from finetune_assets.lineage.retention import collect, subjects
from finetune_assets.recipe.file import load_recipe
from finetune_assets.reporting.errors import FinetuneError, StepFailed
from finetune_assets.store.artifact import Fingerprint, Made
from finetune_assets.store.manifest import LARGEST, manifest_damage
from tests.conftest import MiniProject, make_mini
from tests.store.test_foreign_entries import left_alone
from tests.support.history_fixtures import make_chain, plan_of, store_of

# Those of a whole chain, made by the release before manifests were validated.
BEFORE: dict[str, Any] = json.loads((Path(__file__).parents[1] / "fixtures/manifests.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> MiniProject:
    """A project whose store holds the manifests of an earlier release, and no files."""
    project = make_mini(tmp_path_factory.mktemp("old"))
    project.empty_base()
    return project


def put(project: MiniProject, asset: str, text: str) -> None:
    """Publish a text as the manifest of an asset's current artifact, and the others' as they were."""
    for name, manifest in BEFORE.items():
        folder = project.store / "mini" / name / manifest["fingerprint"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder.parent / "CURRENT").write_text(manifest["fingerprint"])
        wanted = text if name == asset else json.dumps(manifest)
        path = folder / "manifest.json"
        if not path.exists() or path.read_text(encoding="utf-8", errors="replace") != wanted:
            path.write_text(wanted, encoding="utf-8", errors="surrogatepass")


def read_all(project: MiniProject, asset: str) -> bool:
    """Everything that reads manifests; whether the asset's was taken for an artifact."""
    store, recipe = store_of(project), load_recipe(project.recipe_path())
    with Path(os.devnull).open("w") as nowhere:
        out = Console(file=nowhere, width=200)
        plan = make_plan(recipe, project, store)
        found = costs(recipe, project, plan, store, also=NODES)
        out.print(tables.plan_tree("mini", plan, found))
        known = tables.known_artifacts(recipe, plan, store)
        print_results(out, recipe, known, project.ollama_models)
        out.print(*tables.serving_lines(recipe, known, project.ollama_models))
        json.dumps(tables.artifacts_json(known), ensure_ascii=False).encode()
        history.print_collection(
            out, collect(subjects([], project, store), project, store, keep=1, dry_run=True), dry_run=True
        )
        for step in STEPS:
            if step.name not in known:
                continue
            out.print(history.ancestry_tree("mini", ancestry("mini", step.name, store)))
            page(step, known[step.name], recipe, project, reused=True)
        if (served := known.get("ollama_model")) is not None:
            serving_problem(served.metrics, project.ollama_models)
            digests_of(served.metrics)
            try:
                recorded(served.metrics, served.path)
            except FinetuneError as error:
                assert "earlier release" in error.message
    return asset in known


def test_those_of_an_earlier_release_are_read(old: MiniProject):
    for asset in NODES:
        assert manifest_damage(BEFORE[asset]) is None
        put(old, asset, json.dumps(BEFORE[asset]))
        assert read_all(old, asset)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything in a JSON value."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from places(item, (*path, key))


PLACES = {asset: list(places(manifest))[1:] for asset, manifest in BEFORE.items()}
OTHERS = [
    *(None, True, False, 0, 1, -1, 3, 10**18, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "a\0b", "\ud800", "../../etc/passwd", "/etc/passwd", "..", ".", "manifest.json", "\x1b[2J", "x" * 5000),
    *([], {}, [1], [None], ["x"], {"x": 1}, {"": ""}, {"a\0": "b"}, [[[]]], [{"role": 1}], {"file": 1}),
    *("9999-12-31T23:59:59.999+00:00", "0001-01-01T00:00:00+23:00", "2026-11-24", "2026-11-24T00:00:00"),
    json.loads("[" * 60 + "]" * 60),
    json.loads('{"a":' * 300 + "1" + "}" * 300),
]


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, str]:
    """An asset, and the text of its manifest with one to three changes."""
    asset = draw(st.sampled_from(list(BEFORE)))
    manifest = copy.deepcopy(BEFORE[asset])
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(PLACES[asset]))
        parent = manifest
        try:
            for key in way:
                parent = parent[key]
            match draw(st.sampled_from(["other", "other", "other", "gone", "more"])):
                case "other":
                    parent[last] = copy.deepcopy(draw(st.sampled_from(OTHERS)))
                case "gone":
                    del parent[last]
                case "more":
                    parent[last]["more"] = copy.deepcopy(draw(st.sampled_from(OTHERS)))
        except (LookupError, TypeError):
            continue
    return asset, json.dumps(manifest, ensure_ascii=draw(st.booleans()))


SLOW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SLOW
@given(mutations())
def test_whatever_was_changed_in_one_nothing_fails(old: MiniProject, mutation: tuple[str, str]):
    asset, text = mutation
    put(old, asset, text)
    read_all(old, asset)


@SLOW
@given(st.sampled_from(list(BEFORE)), st.data())
def test_whatever_was_cut_or_overwritten_nothing_fails(old: MiniProject, asset: str, data: st.DataObject):
    raw = bytearray(json.dumps(BEFORE[asset]).encode())
    start = data.draw(st.integers(0, len(raw)))
    raw[start : start + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
    put(old, asset, json.dumps(BEFORE[asset]))
    (old.store / "mini" / asset / BEFORE[asset]["fingerprint"] / "manifest.json").write_bytes(raw)
    read_all(old, asset)


def edited(asset: str, *way: Any, value: Any) -> Any:
    manifest = copy.deepcopy(BEFORE[asset])
    parent = manifest
    for key in way[:-1]:
        parent = parent[key]
    parent[way[-1]] = value
    return manifest


@pytest.mark.parametrize(
    ("asset", "way", "value", "words"),
    [
        ("base_model", ("files", "config.json", "size"), "7", "files.config.json.size: input should be a valid int"),
        ("base_model", ("files", "config.json", "size"), -1, "files.config.json.size: input should be greater than"),
        ("base_model", ("files", "config.json"), {}, "no files.config.json.size"),
        ("base_model", ("files", "../x"), {"size": 1, "sha256": "0" * 64}, "files.../x: not the name of a file inside"),
        (
            "base_model",
            ("files", "manifest.json"),
            {},
            "files.manifest.json: not the name of a file inside the artifact",
        ),
        ("base_model", ("seconds",), "long", "no seconds"),
        ("base_model", ("metrics", "source"), ["x"], "metrics.source: input should be a valid string"),
        ("base_model", ("created",), "9999-12-31T23:59:59.999+00:00", "no created"),
        ("base_model", ("inputs",), {"x": "../y"}, "inputs.x: not a name"),
        ("dataset_info", ("parts",), {"train": "abc"}, "no parts.test"),
        ("eval_metrics", ("metrics", "tuned", "bleu-4"), "high", "metrics.tuned.bleu-4: input should be a valid num"),
        ("gguf_file", ("metrics", "types"), {}, "metrics.types: dictionary should have at least 1 item"),
        ("gguf_file", ("parts",), {}, "no parts.f16"),
        ("ollama_model", ("metrics", "where"), "moon", "metrics.where: input should be 'server' or 'store'"),
        ("ollama_model", ("metrics", "digests"), {}, "no metrics.digests of its models"),
        ("ollama_model", ("inputs",), {}, "inputs: no gguf_file"),
    ],
)
def test_damage_is_said_by_plan_and_collection(
    old: MiniProject, asset: str, way: tuple[Any, ...], value: Any, words: str
):
    put(old, asset, json.dumps(edited(asset, *way, value=value)))
    assert not read_all(old, asset)
    lost = store_of(old).lost_current("mini", asset)
    assert lost is not None and f"its manifest is damaged: {words}" in lost
    assert words in left_alone(old, keep=9)[BEFORE[asset]["fingerprint"]]


def in_place(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        path.unlink()
        make(path)

    return run


UNREADABLE: dict[str, Callable[[Path], object]] = {
    "a fifo": in_place(os.mkfifo),
    "a folder": in_place(Path.mkdir),
    "a link to itself": in_place(lambda path: path.symlink_to(path)),
    "a device": in_place(lambda path: path.symlink_to("/dev/zero")),
    "5,000 digits": lambda path: path.write_text(path.read_text().replace('"seed": 42', f'"seed": {"9" * 5000}')),
    "30 digits": lambda path: path.write_text(path.read_text().replace('"seed": 42', f'"seed": {"9" * 30}')),
    "NaN": lambda path: path.write_text(path.read_text().replace('"seed": 42', '"seed": NaN')),
    "infinity": lambda path: path.write_text(path.read_text().replace('"seed": 42', '"seed": 1e999')),
    "a lone surrogate": lambda path: path.write_text(path.read_text().replace('"seed": 42', r'"seed": "\ud800"')),
    "not UTF-8": lambda path: path.write_bytes(b"\xff" + path.read_bytes()),
    "deep": lambda path: path.write_text('{"a":' * 500 + "1" + "}" * 500),
    "deeper": lambda path: path.write_text("[" * 1_000_000),
    "huge": lambda path: os.truncate(path, LARGEST + 1),
}


@pytest.mark.parametrize("harm", UNREADABLE.values(), ids=list(UNREADABLE))
def test_one_that_cannot_be_read_is_set_aside(mini: MiniProject, harm: Callable[[Path], object]):
    made = make_chain(mini)["merged_model"]
    harm(made.path / "manifest.json")
    began = time.monotonic()
    assert plan_of(mini)["merged_model"].reasons == (
        f"{made.fingerprint} exists, but its manifest cannot be read: it will be set aside",
    )
    assert left_alone(mini)[made.fingerprint] == "its manifest cannot be read"
    assert time.monotonic() - began < 5
    make_chain(mini)
    assert {item.state for item in plan_of(mini).values()} == {"fresh"}
    assert os.path.lexists(made.path.with_name(f"set-aside-{made.fingerprint}") / "manifest.json")


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_a_pointer_that_cannot_be_read(mini: MiniProject, make: Callable[[Path], None]):
    pointer = make_chain(mini)["merged_model"].path.parent / "CURRENT"
    in_place(make)(pointer)
    assert plan_of(mini)["merged_model"].state == "fresh"
    assert left_alone(mini) == {"CURRENT": "CURRENT is foreign"}


@pytest.mark.parametrize(
    ("file", "metrics", "words"),
    [
        ("manifest.json", {}, "it holds a file manifest.json, a name that the store reserves"),
        ("x", {"rows": "many"}, "its manifest would be damaged: metrics.rows: input should be"),
    ],
)
def test_what_would_be_a_foreign_entry_is_not_published(
    mini: MiniProject, file: str, metrics: dict[str, Any], words: str
):
    store, identity = store_of(mini), Fingerprint(BEFORE["eval_metrics"]["ingredients"])
    with pytest.raises(StepFailed, match=words), store.building("mini", "eval_metrics", identity.hex) as staging:
        (staging / file).write_text("content")
        record = {key: BEFORE["eval_metrics"][key] for key in ("inputs", "libraries", "seconds", "seed")}
        store.publish(staging, "mini", "eval_metrics", identity, Made({"rows": 1, **metrics}), record)
    assert not store.published("mini", "eval_metrics")
