"""docs/automation.md is what its script prints."""

from docs.automation import page
from tests.conftest import REPOSITORY


def test_the_page_is_what_its_script_prints() -> None:
    assert (REPOSITORY / "docs" / "automation.md").read_text(encoding="utf-8") == page()


def test_the_page_names_every_asset_that_computes_in_a_child() -> None:
    assert "`lora_adapter`, `eval_metrics`, `merged_model` and `gguf_file` compute in a child process" in page()
