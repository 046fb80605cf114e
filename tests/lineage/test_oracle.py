"""Exactly what must run again does: random lineages and edits, judged by a brute-force model without fingerprints.

What plan, store and materialise answer must equal what the model (oracle_world.py) finds.
`ORACLE_EXAMPLES=5000 pytest tests/lineage/test_oracle.py` runs longer, with different examples each time.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings

from finetune_assets.lineage.materialise import materialise
from finetune_assets.lineage.plan import make_plan, open_store
from finetune_assets.reporting.errors import StepFailed
from tests.conftest import make_mini
from tests.support.oracle_world import LOOKS, SESSIONS, Asset, Edit, World, apply, lineage, lineages

EXAMPLES = os.environ.get("ORACLE_EXAMPLES")


def run(world: World, selection: frozenset[int] | None) -> None:
    """Materialise everything, or a selection whose upstreams may be out of date; compare with the oracle."""
    recipe, project = world.recipe(), world.project
    before = make_plan(recipe, project, open_store(project))
    fresh = world.fresh()
    assert {name for name, item in before.items() if item.state == "fresh"} == set(fresh)
    for asset in world.assets:
        item = before[asset.name]
        assert item.state in ("fresh", "stale", "missing", "maybe")
        assert bool(item.reasons) == (item.state != "fresh"), item
        if item.state == "maybe":
            assert any(up not in fresh for up, _ in asset.upstreams), item
            assert world.own_inputs_unchanged(asset), item
    chosen = [
        asset
        for number, asset in enumerate(world.assets)
        if selection is None or number in {index % len(world.assets) for index in selection}
    ]
    for asset in chosen:
        was_fresh = asset.name in world.fresh()
        must_run, record = world.step(asset)
        world.executed.clear()
        try:
            outcome = materialise(asset.name, recipe, project, world.body(asset), lambda event: None)
        except StepFailed as failure:
            assert record is None, failure
            assert not world.executed
            continue
        assert record is not None, f"{asset.name} was made of an input that is not there"
        assert world.executed == [asset.name] * must_run
        assert outcome.reused == (not must_run)
        assert not (must_run and was_fresh)
        record.path = outcome.artifact.path
        files = [path for path in record.path.iterdir() if path.name not in (LOOKS, "manifest.json")]
        assert {path.name: path.read_text() for path in files} == record.content
        current = open_store(project).current(recipe.name, asset.name)
        assert current is not None and current.path == record.path
        if must_run:
            assert before[asset.name].state != "fresh"
    if selection is None:
        after = make_plan(recipe, project, open_store(project))
        assert {item.state for item in after.values()} == {"fresh"}
        assert {name: item.artifact and item.artifact.path for name, item in after.items()} == {
            name: record.path for name, record in world.current.items()
        }


def two(way: str) -> tuple[Asset, Asset]:
    """Two assets, one reading a part of the other: a follows dataset.seed, b stays as it is."""
    return (
        Asset("asset_0", ("dataset.seed",), (), (1, 7)),
        Asset("asset_1", ("train.lora_rank",), (("asset_0", way),), (1, 1)),
    )


ONLY_THE_SECOND = ("run", frozenset([1]))
OVER_THE_SECOND: list[Edit] = [("set", 0, 2), ("run", frozenset([0])), ("run", frozenset([2]))]


@settings(
    max_examples=int(EXAMPLES or 100),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(lineages(), SESSIONS)
# the part that is read stays as it was
@example(two("b"), [("set", 0, 1)])
# the first goes back to what was made before, but only the second is made: of that, not of what was made last
@example(two("a"), [("set", 0, 2), ("run", None), ("set", 0, 0), ("set", 1, 1), ONLY_THE_SECOND])
# of an input that is out of date, twice
@example(two("a"), [("set", 0, 2), ("set", 1, 1), ONLY_THE_SECOND, ONLY_THE_SECOND])
# an input that is damaged, or gone
@example(two("a"), [("harm", 0, 0, 0, "flip"), ONLY_THE_SECOND, ("forget", 0, 0, True), ONLY_THE_SECOND])
# the upstream has to run, and so has this one in any case
@example(two("a"), [("tool", 1, "2"), ("set", 0, 1)])
# two inputs of different ages: the one between was left out
@example((*two("a"), Asset("asset_2", (), (("asset_0", "a"), ("asset_1", "whole")), (1, 1))), OVER_THE_SECOND)
def test_what_ran_again_is_what_had_to(assets: tuple[Asset, ...], session: list[Edit]):
    memory = Path("/dev/shm")  # where it is to be had: many small files that need not survive
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        world = World.begin(make_mini(Path(folder)), assets)
        with lineage(world.nodes()):
            for edit in [("run", None), *session, ("run", None), ("run", None)]:
                if edit[0] == "run":
                    run(world, edit[1])
                else:
                    apply(world, edit)
