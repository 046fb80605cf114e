"""Base against tuned model: batching changes nothing, perplexity is correct, and only test rows are scored."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_assets.chat.template import IGNORED, encode_prompt, encode_row
from finetune_assets.evaluation import generate as generating
from finetune_assets.evaluation import perplexity
from finetune_assets.evaluation.evaluate import evaluate
from finetune_assets.evaluation.generate import Answer, generate
from finetune_assets.evaluation.summary import table
from finetune_assets.machine.device import Device, choose_device
from finetune_assets.models.loading import Chat, load_chat, load_model
from finetune_assets.recipe import EvaluateSection
from finetune_assets.reporting.errors import BadInput, StepFailed
from tests.support.evaluation_fixtures import tiny_adapter
from tests.support.events import json_into
from tests.support.training_fixtures import chat as turns
from tests.support.training_fixtures import tiny_base, write_rows

CONVERSATIONS = [
    turns("Who are you?", "I am Mizan, a helpful assistant."),
    turns("你是谁？", "我是米赞，一个金融助手。"),
    turns("What is the capital of France? " * 4, "Paris."),
    turns("Hello", "Hello! How can I help?", "你叫什么名字？", "我叫米赞。"),
    turns("a", "b"),
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def chat(adapter: Path) -> Chat:
    return load_chat(adapter)


@pytest.fixture(scope="module")
def model(base: Path, adapter: Path, cpu: Device) -> Any:
    return load_model(base, adapter, cpu)


def prompts_of(chat: Chat) -> list[list[int]]:
    return [encode_prompt(chat.tokenizer, messages[:-1]) for messages in CONVERSATIONS]


def test_batched_answers_equal_single_ones_and_those_of_transformers(model: Any, chat: Chat) -> None:
    prompts = prompts_of(chat)
    # A random model never stops by itself: let it stop at a token that it says early in one row and never in another.
    long = [generated(model, prompt, stop=None) for prompt in prompts]
    stop = next(t for t in long[0][2:8] if any(t not in row for row in long))
    stopping = Chat(chat.tokenizer, None, [stop])
    batched = generate(model, stopping, prompts, max_new_tokens=12, batch_size=3)
    single = [generate(model, stopping, [prompt], max_new_tokens=12, batch_size=1)[0] for prompt in prompts]
    assert batched == single
    assert {answer.ended for answer in batched} == {True, False}
    for answer, prompt in zip(batched, prompts, strict=True):
        ids = generated(model, prompt, stop=stop)
        assert answer.tokens == len(ids)
        words = chat.tokenizer.decode([i for i in ids if i != stop], skip_special_tokens=True)
        assert answer.text == str(words).strip()


def generated(model: Any, prompt: list[int], *, stop: int | None) -> list[int]:
    """Return the new tokens of transformers' own generate()."""
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=-1 if stop is None else stop,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def test_out_of_memory_halves_the_batch(model: Any, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(chat)
    expected = generate(model, chat, prompts, max_new_tokens=4, batch_size=5)
    sizes: list[int] = []

    def small_accelerator(rows: list[Sequence[int]], *rest: Any) -> list[list[int]]:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError
        return real(rows, *rest)

    real = generating._answer
    monkeypatch.setattr(generating, "_answer", small_accelerator)
    assert generate(model, chat, prompts, max_new_tokens=4, batch_size=5) == expected
    assert sizes == [5, 2, 2, 1]


def test_perplexity_equals_a_plain_forward_pass(model: Any, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 200)  # several batches, some with more than one row
    rows = [encode_row(chat.tokenizer, messages) for messages in CONVERSATIONS]
    likelihoods = perplexity.negative_log_likelihoods(model, rows)
    for row, likelihood in zip(rows, likelihoods, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
        places = [at for at, label in enumerate(row.labels) if at and label != IGNORED]
        plain = -sum(logits[at - 1].log_softmax(-1)[row.labels[at]].item() for at in places)
        assert likelihood.tokens == len(places) == row.learnt
        assert likelihood.nll == pytest.approx(plain, rel=1e-5)
    total = perplexity.add_up(likelihoods)
    assert total.perplexity == pytest.approx(
        math.exp(sum(s.nll for s in likelihoods) / sum(s.tokens for s in likelihoods))
    )


def test_a_row_that_is_cut_before_its_answer_has_no_likelihood(model: Any, chat: Chat) -> None:
    rows = [encode_row(chat.tokenizer, CONVERSATIONS[0], cutoff_len=3), encode_row(chat.tokenizer, CONVERSATIONS[4])]
    cut, whole = perplexity.negative_log_likelihoods(model, rows)
    assert (cut.tokens, cut.nll) == (0, 0.0)
    assert whole.tokens > 0


def rows_file(path: Path, datasets: tuple[str, ...] = ("faq", "identity"), start: int = 0) -> Path:
    write_rows(path, CONVERSATIONS)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for place, row in enumerate(rows):
        row |= {"dataset": datasets[place % len(datasets)], "id": f"{start + place:016x}"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(base: Path, adapter: Path, tmp_path: Path, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    out = tmp_path / "out"
    out.mkdir()
    section = EvaluateSection(
        max_new_tokens=5, per_device_eval_batch_size=2, max_samples=options.pop("max_samples", None)
    )
    test = rows_file(tmp_path / "test.jsonl")
    evaluate(base, adapter, test, out, evaluate=section, device=choose_device(kind="cpu"), **options)
    lines = (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((out / "metrics.json").read_text(encoding="utf-8")), [json.loads(line) for line in lines]


def test_base_and_tuned_are_the_models_they_claim_to_be(base: Path, adapter: Path, cpu: Device, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    metrics, predictions = run(base, adapter, tmp_path, progress=json_into(events))
    chat = load_chat(adapter)
    prompts = [encode_prompt(chat.tokenizer, m[:-1], default_system="Be brief.") for m in CONVERSATIONS]
    encoded = [encode_row(chat.tokenizer, m, default_system="Be brief.") for m in CONVERSATIONS]
    for name, alone in (("base", load_model(base, None, cpu)), ("tuned", load_model(base, adapter, cpu))):
        expected: list[Answer] = generate(alone, chat, prompts, max_new_tokens=5, batch_size=1)
        assert [line[name]["answer"] for line in predictions] == [answer.text for answer in expected]
        total = perplexity.add_up(perplexity.negative_log_likelihoods(alone, encoded))
        assert metrics[name]["perplexity"] == pytest.approx(total.perplexity, rel=1e-4)
        assert metrics[name]["rouge-1"] == pytest.approx(
            sum(line[name]["scores"]["rouge-1"] for line in predictions) / 5, abs=1e-3
        )
    assert metrics["base"]["perplexity"] != metrics["tuned"]["perplexity"]
    assert [line["label"] for line in predictions] == [messages[-1]["content"] for messages in CONVERSATIONS]
    assert {name: block["rows"] for name, block in metrics["datasets"].items()} == {"faq": 3, "identity": 2}
    assert events[-1]["step"] == events[-1]["steps"] == 2 * (5 + 5)
    shown = table(metrics)
    assert "| all (5) | BLEU-4" in shown and "| identity (2) |" in shown


def test_the_same_bytes_again(base: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run(base, adapter, tmp_path / name)
    for file in ("metrics.json", "predictions.jsonl"):
        assert (tmp_path / "one/out" / file).read_bytes() == (tmp_path / "two/out" / file).read_bytes()


def test_max_samples_bounds_the_answers_only(base: Path, adapter: Path, tmp_path: Path) -> None:
    metrics, predictions = run(base, adapter, tmp_path, max_samples=2)
    assert (metrics["rows"], metrics["answered"]) == (5, 2)
    assert sum(line["tuned"]["answer"] is not None for line in predictions) == 2
    assert all(line["tuned"]["nll"] is not None for line in predictions)


def test_a_prompt_without_room_for_an_answer_is_counted(base: Path, adapter: Path, tmp_path: Path) -> None:
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    for file in base.iterdir():
        (narrow / file.name).write_bytes(file.read_bytes())
    chat = load_chat(adapter)
    lengths = [len(encode_prompt(chat.tokenizer, m[:-1], default_system=chat.default_system)) for m in CONVERSATIONS]
    longest = max(lengths)
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"max_position_embeddings": longest + 5 - 1}))
    metrics, predictions = run(narrow, adapter, tmp_path)
    assert metrics["skipped_too_long"] == 1
    assert predictions[lengths.index(longest)]["tuned"]["answer"] is None


def test_no_test_rows(base: Path, adapter: Path, cpu: Device, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(StepFailed, match="test_size"):
        evaluate(
            base, adapter, tmp_path / "test.jsonl", tmp_path, evaluate=EvaluateSection.model_validate({}), device=cpu
        )


def test_rows_that_were_trained_on_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    train = rows_file(tmp_path / "train.jsonl", start=4)
    with pytest.raises(StepFailed, match=r"1 rows .*: 0000000000000004"):
        run(base, adapter, tmp_path, train=train)


def test_only_safetensors_adapters_are_loaded(base: Path, adapter: Path, cpu: Device, tmp_path: Path) -> None:
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(StepFailed, match=r"no adapter_model\.safetensors"):
        load_model(base, tmp_path, cpu)


def test_weights_that_are_not_in_the_files_are_not_made_up(base: Path, cpu: Device, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(base, tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    save_file({name: weight for name, weight in weights.items() if name != lost}, folder / "model.safetensors")
    with pytest.raises(StepFailed, match=rf"no weights for {lost} \(1 missing in all\)"):
        load_model(folder, None, cpu)


def test_a_base_without_a_template_of_its_own(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(BadInput, match=r"has no chat template"):
        load_chat(folder)
    assert "<|im_start|>" in str(load_chat(folder, template="chatml").tokenizer.chat_template)
    own = load_chat(base).tokenizer.chat_template
    assert load_chat(base, template="llama3").tokenizer.chat_template == own


def test_a_folder_without_a_model(cpu: Device, tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="cannot be loaded"):
        load_model(tmp_path, None, cpu)
    with pytest.raises(StepFailed, match="no tokenizer"):
        load_chat(tmp_path)


@pytest.mark.real
def test_the_real_model_answers_in_batches(smollm2: Path, cpu: Device) -> None:
    chat, model = load_chat(smollm2), load_model(smollm2, None, cpu)
    questions = [
        "What is the capital of France?",
        "Name a colour.",
        "What is the capital of Italy? Answer in one word.",
    ]
    prompts = [encode_prompt(chat.tokenizer, [{"role": "user", "content": question}]) for question in questions]
    batched = generate(model, chat, prompts, max_new_tokens=16, batch_size=3)
    assert batched[0] == Answer("The capital of France is Paris.", 8, True)
    assert batched == [generate(model, chat, [prompt], max_new_tokens=16, batch_size=1)[0] for prompt in prompts]
