"""The Dagster UI in a real browser: the lineage is drawn, and an asset's page says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.screenshots import find_chromium, page, webserver
from finetune_assets.lineage import NODES
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on the PATH")


def test_the_lineage_of_the_demo_is_drawn(tmp_path: Path) -> None:
    with webserver(REPOSITORY, tmp_path) as address, page() as browser:
        browser.goto(f"{address}/locations/finetune_assets/asset-groups/demo/lineage")
        for name in NODES:
            browser.get_by_text(name, exact=True).first.wait_for(timeout=120_000)
        browser.goto(f"{address}/assets/demo/lora_adapter?view=overview")
        browser.get_by_text("A LoRA adapter trained with TRL and PEFT").first.wait_for(timeout=60_000)
