"""A model folder's tokenizer, which tokenises exactly as the folder's own tokenizer.json says."""

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
    """Load the tokenizer of a Hugging Face folder.

    For some classes (Llama's, used by Llama 2, TinyLlama and Zephyr) transformers 5 reads only the vocabulary and the
    merges from tokenizer.json. It then places spaces differently: after a special token it omits the space that begins
    the next word. Such models were trained as the file says, and llama.cpp follows the file. Where the two differ, the
    file decides.

    Raises:
        StepFailed: the tokenizer needs code of the model that is not trusted, or the class is not a tokenizer.
        OSError, ValueError: the folder does not have a tokenizer that can be loaded.
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
            loaded: object = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
        except Exception as error:  # any error of a class that stands in for the model's own
            what = f"cannot load the tokenizer of {folder}"
            failure = None if trust else needs_its_own_code(what, folder, TOKENIZER_CONFIG, refusal(error))
            if failure is not None:
                raise failure from error
            if isinstance(error, RecursionError):  # the class named there is AutoTokenizer
                raise StepFailed(f"{folder}: {NOT_A_TOKENIZER}", CORRECT_CLASS) from None
            raise
    if not isinstance(loaded, PreTrainedTokenizerBase):
        raise StepFailed(f"{folder}: {NOT_A_TOKENIZER}, but {type(loaded).__name__}", CORRECT_CLASS)
    return loaded
