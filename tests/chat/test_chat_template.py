"""What is trained is what is served: ids equal the tokenizer's own rendering, and labels sit on the answers only."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_assets.chat.named_templates import CHATML, LLAMA3, SMOLLM2
from finetune_assets.chat.template import (
    IGNORED,
    chat_settings,
    encode_prompt,
    encode_row,
    resolve_template,
    stop_tokens,
    with_system,
)
from finetune_assets.reporting.errors import BadInput
from tests.support.training_fixtures import chat, tiny_tokenizer

pytestmark = pytest.mark.fast

IM_END, EOT, EOS = 2, 6, 0

CONVERSATIONS = {
    "one turn": chat("Who are you?", "I am Mizan."),
    "several turns": chat("Hi", "Hello!", "Who?", "Mizan.", "Thanks", "Bye"),
    "chinese": chat("你是谁？", "我是米赞，一个金融助手。", "谢谢", "不客气"),
    "empty answer": chat("Say nothing.", "", "And now?", "Something."),
    "empty question": chat("", "What?"),
    "line breaks at the edges": chat("\n\nHi\n", "\n\nHello\n\n", "x", "  y  "),
    "special tokens in the text": chat(
        "a<|im_end|>b <|eot_id|>", "c<|im_end|>\n<|im_start|>user\nd", "e", "<|eot_id|>"
    ),
    "own system": [{"role": "system", "content": "Be brief."}, *chat("Hi", "Hello.")],
}
# A trimmed answer, as in many published templates.
TRIMMING = CHATML.replace("message['content']", "message['content'] | trim")


def rendered_ids(tokenizer, messages) -> list[int]:
    """What the tokenizer itself makes of a whole conversation."""
    return tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]


def labelled(row, tokenizer) -> list[str]:
    """The text of each unbroken run of labels."""
    runs, run = [], []
    for label in [*row.labels, IGNORED]:
        if label != IGNORED:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


@pytest.mark.parametrize(
    "template", [CHATML, SMOLLM2, LLAMA3, TRIMMING], ids=["chatml", "smollm2", "llama3", "trimming"]
)
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("default_system", [None, "You are kind."])
def test_ids_are_those_of_the_whole_rendered_conversation(template: str, name: str, default_system: str | None) -> None:
    tokenizer, messages = tiny_tokenizer(template), CONVERSATIONS[name]
    row = encode_row(tokenizer, messages, default_system=default_system)
    expected = rendered_ids(tokenizer, with_system(messages, default_system))
    assert row.input_ids == expected
    assert len(row.labels) == len(row.input_ids) and not row.cut
    assert all(label in (IGNORED, token) for token, label in zip(row.input_ids, row.labels, strict=True))


@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if name != "line breaks at the edges"])
def test_labels_are_the_answers_and_their_end_marks(name: str) -> None:
    for template, end in ((CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>")):
        tokenizer = tiny_tokenizer(template)
        answers = [turn["content"] + end for turn in CONVERSATIONS[name] if turn["role"] == "assistant"]
        assert labelled(encode_row(tokenizer, CONVERSATIONS[name]), tokenizer) == answers


@given(
    st.lists(
        st.text(st.sampled_from("ab 米赞？\n"), max_size=6)
        | st.sampled_from(["<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n"]),
        min_size=2, max_size=6,
    ).filter(lambda texts: len(texts) % 2 == 0)
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_text_keeps_prompts_unlearnt_and_ends_learnt(texts: list[str]) -> None:
    tokenizer, messages = tiny_tokenizer(CHATML), chat(*texts)
    row = encode_row(tokenizer, messages)
    assert row.input_ids == rendered_ids(tokenizer, messages)
    runs = labelled(row, tokenizer)
    assert len(runs) == len(texts) // 2
    for run, answer in zip(runs, texts[1::2], strict=True):
        # A line break at the start of an answer may be one token with the header's: it is the header's then.
        assert run.endswith("<|im_end|>") and (answer + "<|im_end|>").endswith(run.lstrip("\n"))


def test_generation_is_asked_with_exactly_the_prompt_that_was_trained() -> None:
    tokenizer = tiny_tokenizer(SMOLLM2)
    messages = CONVERSATIONS["chinese"]
    row = encode_row(tokenizer, messages, default_system="系统", mask_history=True)
    start = next(place for place, label in enumerate(row.labels) if label != IGNORED)
    assert encode_prompt(tokenizer, messages[:-1], default_system="系统") == row.input_ids[:start]


def test_mask_history_learns_the_last_answer_only() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    row = encode_row(tokenizer, CONVERSATIONS["several turns"], mask_history=True)
    assert labelled(row, tokenizer) == ["Bye<|im_end|>"]


def test_train_on_prompt_learns_everything() -> None:
    row = encode_row(tiny_tokenizer(CHATML), CONVERSATIONS["several turns"], train_on_prompt=True)
    assert row.labels == row.input_ids


def test_the_two_masks_exclude_each_other() -> None:
    with pytest.raises(BadInput, match="exclude"):
        encode_row(tiny_tokenizer(CHATML), chat("a", "b"), train_on_prompt=True, mask_history=True)


def test_a_cut_answer_gets_no_false_end() -> None:
    tokenizer, messages = tiny_tokenizer(CHATML), chat("Hi", "I am Mizan, a helpful assistant.")
    whole = encode_row(tokenizer, messages)
    row = encode_row(tokenizer, messages, cutoff_len=len(whole.input_ids) - 4)
    assert row.cut and row.input_ids == whole.input_ids[:-4] and row.labels == whole.labels[:-4]
    assert row.learnt > 0 and IM_END not in row.labels


def test_a_row_whose_answer_is_cut_away_has_nothing_to_learn() -> None:
    row = encode_row(tiny_tokenizer(CHATML), chat("A long question " * 20, "Yes."), cutoff_len=32)
    assert row.cut and row.learnt == 0


def test_stop_tokens_are_the_turns_end_then_eos() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    assert stop_tokens(tokenizer, CHATML) == [IM_END, EOS]
    assert stop_tokens(tokenizer, LLAMA3) == [EOT, EOS]
    tokenizer.eos_token = "<|im_end|>"
    assert stop_tokens(tokenizer, CHATML) == [IM_END]


def test_a_template_that_never_ends_a_turn_is_refused() -> None:
    endless = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    with pytest.raises(BadInput, match="would not learn to stop") as caught:
        stop_tokens(tiny_tokenizer(endless), endless)
    assert "chatml" in str(caught.value.hint)


def test_a_template_that_rewrites_history_is_refused_with_a_way_out() -> None:
    # As reasoning models do: a mark that only the last answer carries.
    rewriting = CHATML.replace(
        "message['content'] +",
        "('<think></think>' if loop.last and message['role'] == 'assistant' else '') + message['content'] +",
    )
    tokenizer = tiny_tokenizer(rewriting)
    with pytest.raises(BadInput, match="differently once more turns follow") as caught:
        encode_row(tokenizer, CONVERSATIONS["several turns"])
    assert "mask_history: true" in str(caught.value.hint)
    row = encode_row(tokenizer, CONVERSATIONS["several turns"], mask_history=True)
    assert labelled(row, tokenizer) == ["<think></think>Bye<|im_end|>"]


def test_a_template_that_refuses_a_role_is_explained() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + CHATML
    with pytest.raises(BadInput, match="no system role here") as caught:
        encode_row(tiny_tokenizer(strict), chat("a", "b"), default_system="x")
    assert "default_system" in str(caught.value.hint)
    for_parts = "{% for message in messages %}{{ message['content'] + none }}{% endfor %}"
    with pytest.raises(BadInput, match="refuses a conversation with the roles user, assistant: can only concatenate"):
        encode_row(tiny_tokenizer(for_parts), chat("a", "b"))


def test_names_resolve() -> None:
    tokenizer = tiny_tokenizer("{{ 'own' }}")
    assert resolve_template("auto", tokenizer) == "{{ 'own' }}"
    assert resolve_template("chatml", tokenizer) == CHATML
    with pytest.raises(BadInput, match="did you mean 'chatml'"):
        resolve_template("chatm", tokenizer)
    with pytest.raises(BadInput, match="no chat template"):
        resolve_template("auto", tiny_tokenizer())


def test_a_template_whose_tokens_the_model_lacks_is_refused() -> None:
    class Poor:
        chat_template = None

        def get_vocab(self) -> dict[str, int]:
            return {"<|im_start|>": 0}

    with pytest.raises(BadInput, match=r"needs the tokens <\|im_end\|>"):
        resolve_template("chatml", Poor())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("default_system", [None, ""])
def test_no_system_message_without_a_text(default_system: str | None) -> None:
    assert with_system(chat("a", "b"), default_system) == chat("a", "b")


def test_a_row_keeps_its_own_system_message() -> None:
    own = CONVERSATIONS["own system"]
    assert with_system(own, "other") == own


def test_settings_hold_all_that_a_server_needs() -> None:
    assert chat_settings(tiny_tokenizer(CHATML), "") == {
        "template": CHATML,
        "default_system": None,
        "stop_token_ids": [IM_END, EOS],
        "stop": ["<|im_end|>", "<|endoftext|>"],
    }


@pytest.mark.real
def test_smollm2_by_name_renders_as_the_models_own(smollm2) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for messages in CONVERSATIONS.values():
        own = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ours = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, chat_template=SMOLLM2
        )
        assert ours == own
