"""The checks that a failed step reports, read from its error; the whole set is in test_component's chain."""

from __future__ import annotations

import dagster as dg

from finetune_assets.assets.checks import failed_checks
from finetune_assets.export.parity.checks.failure import Failure
from finetune_assets.export.parity.limits import Figures
from finetune_assets.export.parity.prove import refusal
from finetune_assets.recipe.file import load_recipe
from tests.conftest import MiniProject

KEY = dg.AssetKey(["mini", "gguf_file"])


def test_a_refused_file_fails_the_checks_that_its_error_names(mini: MiniProject):
    mini.edit(gguf={"types": ["f16", "q8_0"]})
    recipe = load_recipe(mini.recipe_path())
    far = Figures(kl=3.0, top1=0.1, ppl_ratio=9.0, tokens_per_second=1.0, points=8, reference="fp32")
    errors = [
        refusal(
            "f16", mini.root / "m-f16.gguf", None, [Failure("rope base", "1.0", "2.0"), Failure("weights", "a", "b")]
        ),
        refusal("q8_0", mini.root / "m-q8_0.gguf", far, [Failure("kl", "mean KL divergence 3 nats per token", "0.02")]),
    ]
    message = "\n".join(error.message for error in errors)
    found = {result.check_name: result.description for result in failed_checks("gguf_file", recipe, message, KEY)}
    assert set(found) == {"rope_base", "weights", "kl_q8_0"}
    assert str(found["rope_base"]).startswith("f16: 1.0") and "0.02" in str(found["kl_q8_0"])


def test_a_server_that_serves_something_else_fails_the_checks_that_it_fails(mini: MiniProject):
    recipe = load_recipe(mini.recipe_path())
    message = "the Ollama server at h:1 does not serve mini:latest as it was made: template: 'a' instead of 'b'"
    (result,) = failed_checks("ollama_model", recipe, message, dg.AssetKey(["mini", "ollama_model"]))
    assert (result.check_name, result.passed) == ("template", False)


def test_an_error_of_another_kind_fails_no_check(mini: MiniProject):
    assert not failed_checks("gguf_file", load_recipe(mini.recipe_path()), "the disk is full", KEY)
