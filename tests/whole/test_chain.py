"""The whole chain on a tiny random model, through the command line and Dagster: what runs, what is left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from finetune_assets.export.ollama.server.temporary import find_binary, serving
from finetune_assets.export.parity.limits import near_the_base
from finetune_assets.lineage.graph import NODES
from tests.conftest import REPOSITORY, MiniProject, make_mini, rows, shared_cache

FINETUNE = (sys.executable, "-m", "finetune_assets.cli")


class Chain:
    """A project whose chain has run once."""

    def __init__(self, project: MiniProject):
        self.project = project
        self.environment = {
            **os.environ,
            "FINETUNE_PROJECT": str(project.root),
            "DAGSTER_HOME": str(project.home),
            "PYTHONPATH": str(REPOSITORY),
            "HF_HUB_OFFLINE": "1",
        }

    def finetune(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*FINETUNE, *arguments],
            env=self.environment,
            cwd=self.project.root,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def json(self, *arguments: str) -> Any:
        done = self.finetune(*arguments, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def run(self, *arguments: str) -> list[str]:
        """Run the recipe; which assets were materialised."""
        return self.json("run", "mini", *arguments)["ran"]

    def states(self) -> dict[str, str]:
        return {item["asset"]: item["state"] for item in self.json("plan", "mini")}

    def artifact(self, asset: str) -> dict[str, Any]:
        return self.json("artifacts", "mini")[asset]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Chain]:
    project = make_mini(tmp_path_factory.mktemp("chain"), base=tiny_base)
    # the converter comes from the cache that the tests share
    project.cache.mkdir(parents=True)
    (project.cache / "wheels").symlink_to(shared_cache() / "wheels")
    made = Chain(project)
    assert made.run() == list(NODES)
    yield made


def test_a_second_run_finds_everything_up_to_date(chain: Chain):
    assert set(chain.states().values()) == {"fresh"}
    done = chain.finetune("run", "mini")
    assert done.returncode == 0
    assert "everything is up to date" in done.stdout
    assert "Try next" in done.stdout


def test_every_artifact_is_whole(chain: Chain):
    found = chain.json("artifacts", "mini")
    assert list(found) == list(NODES)
    for name, entry in found.items():
        assert set(entry) == {"path", "fingerprint", "data_version", "files"}
        assert entry["files"], name
        for file in entry["files"]:
            assert (Path(entry["path"]) / file).is_file()
    assert {"adapter_model.safetensors", "adapter_config.json", "loss.png", "chat.json"} <= set(
        found["lora_adapter"]["files"]
    )


def test_no_machine_path_or_pickle_is_in_what_is_published(chain: Chain):
    for name in ("lora_adapter", "merged_model"):
        folder = Path(chain.artifact(name)["path"])
        for path in folder.iterdir():
            assert path.suffix not in (".bin", ".pt", ".pkl"), path
            if path.suffix == ".json" and path.name != "manifest.json":
                assert str(chain.project.root) not in path.read_text(), path


def test_a_gguf_type_more_makes_that_file_only(chain: Chain):
    before = chain.artifact("gguf_file")
    kept = Path(before["path"]) / "mini-f16.gguf"
    chain.project.edit(gguf={"types": ["f16", "q8_0", "f32"]})
    assert chain.states()["gguf_file"] == "stale"
    assert chain.states()["ollama_model"] == "maybe"
    chain.run()
    after = chain.artifact("gguf_file")
    files = {"chat.json", "mini-f16.gguf", "mini-q8_0.gguf", "mini-f32.gguf", "size_and_kl.png"}
    assert set(after["files"]) == files
    assert (Path(after["path"]) / "mini-f16.gguf").stat().st_ino == kept.stat().st_ino, "linked, not made again"
    chain.project.edit(gguf={"types": None})
    assert set(chain.states().values()) == {"fresh"}
    assert chain.run() == []
    current = chain.json("explain", "mini/gguf_file")["ancestry"][0]
    assert current["fingerprint"] == before["fingerprint"], "back at earlier values, the earlier one is the current one"


def test_rounding_is_held_against_what_training_changed(chain: Chain):
    merged, gguf = (
        json.loads((Path(chain.artifact(name)["path"]) / "manifest.json").read_text())["metrics"]
        for name in ("merged_model", "gguf_file")
    )
    changed = gguf["kl_from_base"]
    assert changed == merged["check"]["kl_from_base"] > 0
    warned = [kind for kind, entry in gguf["types"].items() if entry["kl"] > changed / 2]
    said = near_the_base({kind: entry["kl"] for kind, entry in gguf["types"].items()}, changed)
    assert [text.partition(":")[0] for text in said] == warned
    assert len(near_the_base({"f16": changed * 0.4, "q4_0": changed * 0.6}, changed)) == 1


def test_a_gguf_file_too_far_from_the_merged_model_is_not_published(chain: Chain):
    folder = Path(chain.artifact("gguf_file")["path"])
    figures = json.loads((folder / "manifest.json").read_text())["metrics"]["types"]
    assert figures["q8_0"]["kl"] > 0
    published = sorted(folder.parent.iterdir())
    chain.project.edit(gguf={"max_kl": {"q8_0": 1e-12}})
    done = chain.finetune("run", "mini")
    assert done.returncode == 1
    assert "q8_0 is too coarse for this model (mini-q8_0.gguf)" in done.stderr
    assert "check kl: mean KL divergence" in done.stderr and "allowed: 1e-12" in done.stderr
    assert sorted(folder.parent.iterdir()) == published
    with dg.DagsterInstance.from_config(str(chain.project.home)) as instance:
        check = dg.AssetCheckKey(dg.AssetKey(["mini", "gguf_file"]), "kl_q8_0")
        records = instance.event_log_storage.get_asset_check_execution_history(check, limit=2)
    assert [record.status.value for record in records] == ["FAILED", "SUCCEEDED"]
    chain.project.edit(gguf={"max_kl": None})
    assert set(chain.states().values()) == {"fresh"}


def test_a_system_prompt_reaches_the_served_model_only(chain: Chain):
    chain.project.edit(ollama={"system": "Be brief."})
    assert [name for name, state in chain.states().items() if state != "fresh"] == ["ollama_model"]
    assert chain.run() == ["ollama_model"]
    chain.project.edit(ollama={"system": None})
    reasons = {item["asset"]: item["reasons"] for item in chain.json("plan", "mini")}
    assert "serves another mini" in reasons["ollama_model"][0], "going back: only what lives outside has to move"
    assert chain.run() == ["ollama_model"]
    assert set(chain.states().values()) == {"fresh"}


def test_reformatted_data_does_not_train_again(chain: Chain):
    chain.project.write_rows(list(reversed(rows())), indent=3)
    adapter = chain.artifact("lora_adapter")["fingerprint"]
    chain.run()
    assert chain.artifact("lora_adapter")["fingerprint"] == adapter
    assert set(chain.states().values()) == {"fresh"}


def test_the_same_recipe_and_data_give_the_same_bytes(chain: Chain):
    before = chain.json("artifacts", "mini")
    assert chain.run("--force", "--to", "gguf_file") == [name for name in NODES if name == "gguf_file"], (
        "force builds the named asset again, and nothing that is up to date"
    )
    chain.run("--force", "--to", "lora_adapter")
    after = chain.json("artifacts", "mini")
    for name in ("lora_adapter", "gguf_file"):
        assert after[name]["files"] == before[name]["files"], name
    assert set(chain.states().values()) == {"fresh"}


def test_a_learning_rate_reaches_the_adapter_and_what_follows(chain: Chain):
    chain.project.edit(train={"learning_rate": 2e-3})
    assert chain.states() == {
        "raw_dataset": "fresh",
        "dataset_info": "fresh",
        "base_model": "fresh",
        "lora_adapter": "stale",
        "eval_metrics": "maybe",
        "merged_model": "maybe",
        "gguf_file": "maybe",
        "ollama_model": "maybe",
    }
    assert "train.learning_rate 0.001 -> 0.002" in chain.json("plan", "mini")[3]["reasons"]
    chain.project.edit(train={"learning_rate": 1e-3})
    assert set(chain.states().values()) == {"fresh"}


def test_a_failing_step_is_one_message_and_exit_code_1(chain: Chain):
    chain.project.write_rows([*rows(), {"instruction": "x", "output": ""}], indent=0)
    done = chain.finetune("run", "mini")
    assert done.returncode == 1
    assert "the row has no answer: 'output' is empty" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    chain.project.write_rows(list(reversed(rows())), indent=3)
    assert set(chain.states().values()) == {"fresh"}, "what was published stays"


def test_one_can_talk_to_every_stage(chain: Chain):
    answers = {}
    for stage in ("base", "adapter", "merged", "gguf"):
        done = chain.finetune("chat", "mini", "--with", stage, "-m", "Say something.", "--max-new-tokens", "8")
        assert (done.returncode, done.stderr) == (0, ""), stage
        answers[stage] = done.stdout
    assert answers["adapter"] == answers["merged"]
    assert all(answers.values())


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "dagster", "job", "execute", "-m", "finetune_assets.definitions", "-j", "mini_job"],
        [str(Path(sys.executable).with_name("dg")), "launch", "--job", "mini_job", "--target-path", str(REPOSITORY)],
    ],
    ids=["dagster job execute", "dg launch"],
)
def test_dagster_executes_the_same_job(chain: Chain, command: list[str]):
    done = subprocess.run(
        command,
        env=chain.environment,
        cwd=chain.project.root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert set(chain.states().values()) == {"fresh"}


def test_dagster_records_our_data_versions(chain: Chain):
    script = """
import json, sys, dagster as dg
with dg.DagsterInstance.get() as instance:
    found = {}
    for name in sys.argv[1:]:
        event = instance.get_latest_materialization_event(dg.AssetKey(["mini", name]))
        found[name] = event.asset_materialization.tags["dagster/data_version"]
print(json.dumps(found))
"""
    command = [sys.executable, "-c", script, *NODES]
    done = subprocess.run(command, env=chain.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    recorded = json.loads(done.stdout.splitlines()[-1])
    assert recorded == {name: entry["data_version"] for name, entry in chain.json("artifacts", "mini").items()}


def test_a_merged_model_is_the_next_base(chain: Chain):
    """Training on: the folder holds our manifest and chat.json, and the template that it was trained with."""
    merged = Path(chain.artifact("merged_model")["path"])
    chain.project.copy_recipe("next")
    chain.project.edit("next", model={"model_name_or_path": str(merged.relative_to(chain.project.root))})
    assert chain.json("run", "next", "--to", "lora_adapter")["ran"][-1] == "lora_adapter"
    made = chain.json("artifacts", "next")
    assert "manifest.json" not in made["base_model"]["files"]
    states = {item["asset"]: item["state"] for item in chain.json("plan", "next")}
    assert states["base_model"] == states["lora_adapter"] == "fresh"
    folders = (merged, Path(made["base_model"]["path"]), Path(made["lora_adapter"]["path"]))
    settings = [json.loads((folder / "chat.json").read_text()) for folder in folders]
    assert settings[0] == settings[1] == settings[2] and settings[0]["template"]
    chain.project.recipe_path("next").unlink()


def test_no_artifact_knows_where_the_project_is(chain: Chain):
    places = (str(chain.project.root).encode(), str(REPOSITORY).encode())
    files = [path for path in chain.project.store.rglob("*") if path.is_file()]
    assert files and not [path for path in files if any(place in path.read_bytes() for place in places)]


@pytest.mark.skipif(find_binary() is None, reason="no Ollama: neither OLLAMA_BIN nor `ollama` on the PATH")
def test_a_server_that_answers_gets_the_model(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with serving(tmp_path / "models") as host:
        monkeypatch.setitem(chain.environment, "OLLAMA_HOST", host)
        assert "has no model mini" in chain.json("plan", "mini")[-1]["reasons"][0]
        assert chain.run() == ["ollama_model"]
        assert set(chain.states().values()) == {"fresh"}
        done = chain.finetune("chat", "mini", "-m", "Say something.", "--max-new-tokens", "4")
        assert done.returncode == 0, done.stderr
    assert list((tmp_path / "models").rglob("mini/latest"))
    assert not list((tmp_path / "models").rglob("mini/staging"))
