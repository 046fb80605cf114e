"""The Dagster UI in a real browser: the lineage is drawn, an asset's page says what it is, and its button works."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from docs.screenshots import find_chromium, page, webserver
from finetune_assets.lineage.graph import NODES
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on the PATH")


def test_the_lineage_is_drawn_and_an_asset_can_be_materialised(tmp_path: Path) -> None:
    shutil.copyfile(REPOSITORY / "dagster_home" / "dagster.yaml", tmp_path / "dagster.yaml")
    with webserver(REPOSITORY, tmp_path) as address, page() as browser:
        browser.goto(f"{address}/locations/finetune_assets/asset-groups/demo/lineage")
        for name in NODES:
            browser.get_by_text(name, exact=True).first.wait_for(timeout=120_000)
        browser.goto(f"{address}/assets/demo/lora_adapter?view=overview")
        browser.get_by_text("A LoRA adapter trained with TRL and PEFT").first.wait_for(timeout=60_000)
        browser.goto(f"{address}/assets/demo/raw_dataset?view=overview")
        browser.locator("button", has_text="Materialize").first.click(timeout=60_000)
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("artifacts/demo/raw_dataset/*/manifest.json")):
            assert time.monotonic() < deadline, "the run that the button starts publishes the artifact"
            time.sleep(0.5)
        time.sleep(5)  # the run reports to Dagster after it has published
        browser.reload()
        browser.get_by_text("fingerprint").first.wait_for(timeout=60_000)
