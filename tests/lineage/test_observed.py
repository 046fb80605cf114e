"""Dagster's pages agree with the plan: after its observations, Dagster calls stale what the plan calls stale."""

from __future__ import annotations

from collections.abc import Iterator

import dagster as dg
import pytest

from finetune_assets.assets.automation import events
from finetune_assets.assets.keys import READ, file_key, values_key
from finetune_assets.definitions import load_definitions
from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.readings import observe
from finetune_assets.recipe.file import load_recipe
from tests.conftest import MiniProject, rows
from tests.support.dagster_internals import CachingStaleStatusResolver, LoadingContextForTest
from tests.support.history_fixtures import make_chain, plan_of, store_of


class Told:
    """A project with a Dagster instance that is told the news."""

    def __init__(self, project: MiniProject, instance: dg.DagsterInstance):
        self.project, self.instance = project, instance
        self.graph = load_definitions(project).resolve_asset_graph()  # once: nothing is loaded again

    def tell(self) -> int:
        news = events.pending_events(observe(load_recipe(self.project.recipe_path()), self.project), self.instance)
        for event in news:
            self.instance.report_runless_asset_event(event)
        return len(news)

    def badges(self) -> dict[str, str]:
        """What Dagster says of each asset: FRESH, STALE or MISSING."""
        resolver = CachingStaleStatusResolver(
            instance=self.instance,
            asset_graph=self.graph,
            loading_context=LoadingContextForTest(self.instance),
        )
        return {name: resolver.get_status(dg.AssetKey(["mini", name])).value for name in NODES}

    def stale(self) -> set[str]:
        """Assets that both Dagster and the plan call stale; they have to agree."""
        self.tell()
        planned = {name: item.state for name, item in plan_of(self.project).items()}
        badges = self.badges()
        dagster = {name for name, badge in badges.items() if badge == "STALE"}
        assert dagster == {name for name, state in planned.items() if state == "stale"}, (badges, planned)
        assert self.tell() == 0, "what Dagster knows is not told again"
        return dagster


@pytest.fixture
def told(mini: MiniProject, monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    monkeypatch.setattr(events, "page", lambda *_, **__: {})  # the stand-ins' pages have nothing to show
    make_chain(mini)
    with dg.instance_for_test(temp_dir=str(mini.home)) as instance:
        yield Told(mini, instance)


def test_what_was_made_without_dagster_is_shown_as_made(told: Told):
    assert set(told.badges().values()) == {"MISSING"}
    assert told.stale() == set()
    assert set(told.badges().values()) == {"FRESH"}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"train": {"learning_rate": 2e-3}}, "lora_adapter"),
        ({"dataset": {"test_size": 3}}, "dataset_info"),
        ({"evaluate": {"max_new_tokens": 5}}, "eval_metrics"),
        ({"export": {"export_dtype": "float16"}}, "merged_model"),
        ({"gguf": {"types": ["f16", "q8_0", "f32"]}}, "gguf_file"),
        ({"ollama": {"system": "Be brief."}}, "ollama_model"),
    ],
)
def test_a_changed_value_marks_the_asset_that_reads_it(told: Told, sections: dict, expected: str):
    told.stale()
    told.project.edit(**sections)
    assert told.stale() == {expected}
    make_chain(told.project)
    assert told.stale() == set()


def test_an_unread_part_of_an_upstream_marks_nothing(told: Told):
    """gguf_file has a new version then, and ollama_model, which serves one type of it, is still up to date."""
    told.stale()
    told.project.edit(gguf={"types": ["f16", "q8_0", "f32"]})
    make_chain(told.project, upto="gguf_file")
    assert told.stale() == set()


def test_a_data_file_marks_raw_dataset_and_its_node_shows_a_new_version(told: Told):
    told.stale()
    key = file_key(load_recipe(told.project.recipe_path()), "facts")
    before = told.instance.fetch_observations(key, limit=1).records[0].asset_observation
    told.project.write_rows(rows(), indent=4)
    assert told.stale() == {"raw_dataset"}
    after = told.instance.fetch_observations(key, limit=1).records[0].asset_observation
    assert before and after and before.tags != after.tags
    make_chain(told.project)
    assert told.stale() == set(), "the same rows: nothing after dataset_info"


def test_a_damaged_file_is_seen_and_so_is_its_mending(told: Told):
    told.stale()
    adapter = store_of(told.project).current("mini", "lora_adapter")
    assert adapter is not None
    (adapter.path / "weights.json").write_text("x")
    assert told.stale() == {"lora_adapter"}
    make_chain(told.project)
    assert told.stale() == set()


def test_going_back_to_earlier_values_needs_no_run_but_what_is_served(told: Told):
    told.stale()
    told.project.edit(train={"learning_rate": 2e-3})
    make_chain(told.project)
    assert told.stale() == set()
    told.project.edit(train={"learning_rate": 1e-3})
    assert told.stale() == {"ollama_model"}


def test_a_comment_or_a_spelled_out_default_is_no_news(told: Told):
    told.stale()
    path = told.project.recipe_path()
    path.write_text("# a comment\n" + path.read_text())
    told.project.edit(train={"num_train_epochs": 3.0}, export={"export_size": 5})
    assert told.tell() == 0


def test_the_observe_button_looks_at_the_files_as_they_are(told: Told):
    """No reload: the definitions are those from before the edit."""
    told.stale()
    recipe = load_recipe(told.project.recipe_path())
    definitions = load_definitions(told.project)
    told.project.edit(train={"learning_rate": 2e-3})
    key = values_key(recipe, "lora_adapter")
    job = definitions.resolve_implicit_global_asset_job_def()
    assert job.execute_in_process(instance=told.instance, asset_selection=[key]).success
    assert told.badges()["lora_adapter"] == "STALE"


def test_provenance_names_what_was_read_not_what_was_observed_last(told: Told):
    """A run after an edit that nobody observed: the data version on record is that of the bytes read."""
    told.stale()
    recipe = load_recipe(told.project.recipe_path())
    told.project.write_rows(rows()[:-1])
    job = load_definitions(told.project).resolve_implicit_global_asset_job_def()
    raw = dg.AssetKey(["mini", "raw_dataset"])
    assert job.execute_in_process(instance=told.instance, asset_selection=[raw]).success
    event = told.instance.get_latest_materialization_event(raw)
    assert event and event.asset_materialization and event.asset_materialization.tags
    read = event.asset_materialization.tags[READ + file_key(recipe, "facts").to_user_string()]
    reading = observe(recipe, told.project).readings["raw_dataset"]
    assert read == reading.files["facts"]
    observed = told.instance.fetch_observations(file_key(recipe, "facts"), limit=1).records[0].asset_observation
    assert observed and (observed.tags or {})["dagster/data_version"] != read
