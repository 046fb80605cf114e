"""Tokenizers of base models: text is cut up as their tokenizer.json says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune_assets.chat.tokenizer import load_tokenizer

pytestmark = pytest.mark.fast

SPECIAL = ("<unk>", "<s>", "</s>")
PROMPT = "<|user|>\nab</s>\n<|assistant|>\n"  # TinyLlama's words: text goes on behind a special token


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 2's kind of tokenizer: each piece of text, also behind a special token, begins with a space."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))])}
    for word in "▁<|>abersintu\n[HoZ":
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(list(SPECIAL))
    folder = tmp_path_factory.mktemp("llama")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        **dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True)),
        "chat_template": "{{ messages[0]['content'] }}{{ eos_token }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_text_behind_a_special_token_begins_as_the_file_says(llama: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    wanted = Tokenizer.from_file(str(llama / "tokenizer.json")).encode(PROMPT, add_special_tokens=False)
    assert wanted.tokens[wanted.tokens.index("</s>") + 1 :][:2] == ["▁", "\n"]
    tokenizer = load_tokenizer(llama)
    assert tokenizer(PROMPT, add_special_tokens=False)["input_ids"] == wanted.ids
    assert tokenizer.chat_template is not None
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    # and so whoever loads what is saved with the adapter and the merged model
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(PROMPT, add_special_tokens=False)["input_ids"] == wanted.ids


def test_a_tokenizer_that_goes_by_its_file_stays_what_it_is(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    assert type(load_tokenizer(smollm2)) is type(AutoTokenizer.from_pretrained(smollm2))
