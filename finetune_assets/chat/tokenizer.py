"""A model folder's tokenizer, cutting text up as the folder's own tokenizer.json says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune_assets.inputs.remote_code import TOKENIZER_CONFIG, gate, needs_its_own_code, refusal
from finetune_assets.reporting.errors import StepFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_A_TOKENIZER = "the tokenizer_class of tokenizer_config.json is not a tokenizer class"
CORRECT_CLASS = "correct it, or fetch the model's files again"


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder.

    For some classes (Llama's, so that of Llama 2, TinyLlama, Zephyr) transformers 5 takes from tokenizer.json the
    vocabulary and merges only, and puts spaces in other places than the file says, which is what such a model was
    trained with and what llama.cpp does: after a special token it leaves out the one that begins the next word. Where
    the two differ, the file decides.

    Raises:
        StepFailed: the tokenizer is code that comes with the model, which is not trusted, or not a tokenizer.
        OSError, ValueError: no tokenizer can be loaded from there.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = _load(folder, trust_remote_code)
    file = folder / "tokenizer.json"
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or not file.is_file():
        return tokenizer
    text = f"{tokenizer.eos_token or ''}\nHorse  {tokenizer.eos_token or ''}[Zebra"
    own = Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids
    if tokenizer(text, add_special_tokens=False)["input_ids"] == own:
        return tokenizer
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _load(folder: Path, trust: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    with gate(trust=trust):
        try:
            found: object = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
        except Exception as error:  # whatever a class raises that stands in for the model's own
            what = f"cannot load the tokenizer of {folder}"
            failure = None if trust else needs_its_own_code(what, folder, TOKENIZER_CONFIG, refusal(error))
            if failure is not None:
                raise failure from error
            if isinstance(error, RecursionError):  # the class named there is AutoTokenizer
                raise StepFailed(f"{folder}: {NOT_A_TOKENIZER}", CORRECT_CLASS) from None
            raise
    if not isinstance(found, PreTrainedTokenizerBase):
        raise StepFailed(f"{folder}: {NOT_A_TOKENIZER}, but {type(found).__name__}", CORRECT_CLASS)
    return found
