"""The repository as a `dg` project: Dagster's own command line checks, lists, serves and runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path
from typing import Any

import dagster
import pytest

from docs.screenshots import webserver
from finetune_assets.lineage.graph import NODES
from tests.conftest import REPOSITORY, MiniProject
from tests.support.dagster_internals import CHECKED_ON

DG = str(Path(sys.executable).with_name("dg"))


def dg(*arguments: str, project: Path = REPOSITORY, home: Path) -> str:
    """Run `dg` on this repository over a project's recipes; what it prints."""
    done = subprocess.run(
        [DG, *arguments, "--target-path", str(REPOSITORY)],
        env={**os.environ, "FINETUNE_PROJECT": str(project), "DAGSTER_HOME": str(home), "PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("check toml", "All TOML configuration files are valid."),
        ("check defs", "All definitions loaded successfully."),
    ],
)
def test_dg_finds_nothing_wrong(tmp_path: Path, command: str, answer: str):
    assert answer in dg(*command.split(), home=tmp_path)


def test_dg_lists_every_asset_and_the_job_of_every_recipe(tmp_path: Path):
    listed = json.loads(dg("list", "defs", "--json", home=tmp_path))
    keys = {asset["asset_key"] for asset in listed["assets"]}
    assert keys >= {f"demo/{name}" for name in NODES}
    assert {job["name"] for job in listed["jobs"]} >= {"demo_job", "llama3_fintech_job"}


def test_dg_launches_a_run_of_the_assets_that_are_named(mini: MiniProject):
    mini.empty_base()
    selection = 'key:"mini/raw_dataset" or key:"mini/dataset_info"'
    dg("launch", "--assets", selection, project=mini.root, home=mini.home)
    assert {path.parent.parent.name for path in mini.store.rglob("manifest.json")} == {"raw_dataset", "dataset_info"}


def test_dg_dev_serves_the_code_location(tmp_path: Path):
    shutil.copyfile(REPOSITORY / "dagster_home" / "dagster.yaml", tmp_path / "dagster.yaml")
    with webserver(REPOSITORY, tmp_path, command=[DG, "dev", "--use-active-venv"]) as address:
        assert "demo_job" in _jobs(address)


def test_private_names_of_dagster_were_checked_on_this_release():
    assert dagster.__version__ == CHECKED_ON, "look at the names in tests/support/dagster_internals.py again"


def _jobs(address: str) -> list[str]:
    query = "{repositoriesOrError{... on RepositoryConnection{nodes{jobs{name}}}}}"
    request = urllib.request.Request(
        f"{address}/graphql", json.dumps({"query": query}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: Any = json.load(response)
    return [job["name"] for node in answer["data"]["repositoriesOrError"]["nodes"] for job in node["jobs"]]


def test_uv_takes_the_versions_that_pip_takes():
    pins = (REPOSITORY / "constraints.txt").read_text().splitlines()
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["uv"]
    assert settings["constraint-dependencies"] == [pin for pin in pins if pin and not pin.startswith("#")]
