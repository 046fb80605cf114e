"""Recipes: what is accepted and refused, and the messages of refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune_assets.recipe.file import find_recipe, json_schema, load_recipe, recipe_files
from finetune_assets.reporting.errors import BadInput

pytestmark = pytest.mark.fast

REPOSITORY = Path(__file__).resolve().parents[2]
GOOD = """\
dataset: {dataset: facts}
model: {model_name_or_path: ./base}
ollama: {name: mini}
"""


def load(tmp_path: Path, text: str, name: str = "mini.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


def complaint(tmp_path: Path, text: str, name: str = "mini.yaml") -> str:
    with pytest.raises(BadInput) as caught:
        load(tmp_path, text, name)
    return str(caught.value).replace(str(tmp_path) + "/", "")


def test_names_may_be_a_list_or_a_comma_separated_text(tmp_path: Path):
    assert load(tmp_path, GOOD.replace("facts", "'a, b'")).dataset.dataset == ["a", "b"]
    assert load(tmp_path, GOOD.replace("facts", "[a, b]")).dataset.dataset == ["a", "b"]


def test_an_exponent_without_a_dot_is_a_number(tmp_path: Path):
    assert load(tmp_path, GOOD + "train: {learning_rate: 5e-5}").train.learning_rate == 5e-5


def test_yaml_no_means_the_strategy_no(tmp_path: Path):
    assert load(tmp_path, GOOD + "train: {eval_strategy: no}").train.eval_strategy == "no"


def test_all_errors_are_reported_at_once_each_with_its_line(tmp_path: Path):
    text = GOOD + "train:\n  learnig_rate: 1\n  lora_rank: eight\n  warmup_steps: -1\ncutoff_len: 3\n"
    assert complaint(tmp_path, text).splitlines() == [
        "mini.yaml:5: train.learnig_rate: unknown key; did you mean 'learning_rate'?",
        "mini.yaml:6: train.lora_rank: input should be a valid integer, unable to parse string as an integer, "
        "not 'eight'",
        "mini.yaml:7: train.warmup_steps: input should be greater than or equal to 0, not -1",
        "mini.yaml:8: cutoff_len: unknown key; it belongs to the section 'train'",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dataset: [", "mini.yaml:1:"),
        ("- a\n- b\n", "a recipe is a mapping of sections"),
        ("", "a recipe is a mapping of sections"),
        (GOOD + "ollama: {name: two}\n", "mini.yaml:4: ollama: given twice (first in line 3)"),
        (GOOD + "gguf: {types: [f16, q4_km]}\n", "unknown GGUF type 'q4_km'; did you mean 'q4_k_m'?"),
        (GOOD + "gguf: {max_kl: {q4_km: 0.1}}\n", "gguf.max_kl: unknown GGUF type 'q4_km'; did you mean 'q4_k_m'?"),
        (GOOD + "gguf: {max_kl: {q2_k: 0}}\n", "gguf.max_kl.q2_k: input should be greater than 0"),
        (GOOD + "gguf: {max_kl: {q2_k: .nan}}\n", "gguf.max_kl.q2_k: input should be a finite number"),
        (GOOD + "gguf: {max_kl: 0.5}\n", "gguf.max_kl: input should be a valid dictionary"),
        (GOOD.replace("name: mini", "name: 'a b'"), "'a b' is not a valid Ollama model name"),
        (GOOD.replace("name: mini", "name: ../../etc/x"), "is not a valid Ollama model name"),
        (GOOD.replace("name: mini}", "name: mini, stop: ['']}"), "a stop text is empty"),
        (GOOD.replace("name: mini}", "name: mini, type: q8_0}\ngguf: {types: f16}"), "not among gguf.types (f16)"),
        (GOOD.replace("./base", "pypi:thing/file.gguf"), "write a packaged model as pypi:PACKAGE==VERSION/FILE.gguf"),
        (GOOD.replace("./base", "pypi:thing==1/file.gguf"), "needs model_sha256"),
        (GOOD + "train: {bf16: true, fp16: true}", "bf16 and fp16 exclude each other"),
        (GOOD + "train: {train_on_prompt: true, mask_history: true}", "train_on_prompt and mask_history exclude"),
        (GOOD + "train: {disable_shuffling: true, group_by_length: true}", "disable_shuffling and group_by_length"),
        ("model: {model_name_or_path: x}\nollama: {name: x}\n", "dataset: missing"),
        (GOOD + "name: other\n", "the file name is the recipe's name"),
    ],
)
def test_bad_input_is_explained(tmp_path: Path, text: str, words: str):
    assert words in complaint(tmp_path, text)


def test_a_file_name_that_cannot_name_a_group_is_refused(tmp_path: Path):
    said = complaint(tmp_path, GOOD, "my model.yaml")
    assert said == (
        "my model.yaml:1: the file's name 'my model' cannot be a recipe's name: "
        "use letters, digits, '_' and '-' only, not ' '; rename the file"
    )


def test_a_recipe_that_is_not_utf8(tmp_path: Path):
    (tmp_path / "mini.yaml").write_bytes(b"dataset: \xff")
    with pytest.raises(BadInput, match=r"mini.yaml:1: not UTF-8 \(byte 9\)"):
        load_recipe(tmp_path / "mini.yaml")


def test_an_unknown_recipe_gets_the_nearest_name():
    with pytest.raises(BadInput, match="did you mean 'demo'"):
        find_recipe("demos", REPOSITORY / "configs")
    with pytest.raises(BadInput, match="no such recipe file"):
        find_recipe("configs/demos.yaml", REPOSITORY / "configs")


@pytest.mark.parametrize("path", recipe_files(REPOSITORY / "configs"), ids=lambda path: path.stem)
def test_the_recipes_of_this_repository_are_good(path: Path):
    assert load_recipe(path).name == path.stem


def test_the_real_world_recipe_is_the_case_this_project_was_made_for():
    recipe = load_recipe(REPOSITORY / "configs" / "llama3_fintech.yaml")
    train = recipe.train
    assert recipe.model.model_name_or_path == "shenzhi-wang/Llama3-8B-Chinese-Chat"
    assert (recipe.model.template, recipe.dataset.dataset, recipe.dataset.val_size) == (
        "llama3",
        ["fintech", "identity"],
        0.02,
    )
    assert (train.lora_rank, train.lora_alpha, train.lora_dropout, train.lora_target) == (8, 16, 0, "all")
    assert (train.learning_rate, train.lr_scheduler_type, train.num_train_epochs) == (5e-5, "cosine", 10)
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps, train.cutoff_len) == (2, 8, 2048)
    assert train.bf16 is True
    assert set(recipe.gguf.types) == {"f16", "q8_0", "q4_k_m"}
    assert recipe.ollama.name == "llama-3-8b-fintech"


def test_the_schema_for_editors_is_the_one_of_the_code():
    committed = json.loads((REPOSITORY / "configs" / "recipe.schema.json").read_text(encoding="utf-8"))
    assert committed == json_schema(), "run: finetune schema > configs/recipe.schema.json"
