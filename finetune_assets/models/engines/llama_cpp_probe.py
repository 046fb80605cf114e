"""What a GGUF file makes of a conversation inside llama.cpp: the ids it reads, and the next-token distributions."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.models.engines.engine import Messages
from finetune_assets.models.engines.llama_cpp_engine import GgufEngine
from finetune_assets.reporting.errors import StepFailed

if TYPE_CHECKING:
    import numpy as np

# Tokens of a distribution that llama.cpp tells; the rest of the probability is one more outcome. A whole vocabulary
# would be megabytes of JSON for each position, and say the same: the tail holds next to nothing.
TOP = 2000
# Outweighs any logit: the token that has it is the one sampled. The reported distribution is the model's own.
FORCED = 1000
NO_CHARACTER = "\ufffd"  # stands for bytes that are none
TIMEOUT = 60.0  # seconds, for a tokenizer


@dataclass(frozen=True)
class Distribution:
    """llama.cpp's next-token distribution.

    Attributes:
        ids: of the likeliest tokens, the first one leading. Shape (n,), n at most `TOP`.
        logprobs: natural logarithms of their probabilities, float64. Shape (n,).
    """

    ids: np.ndarray
    logprobs: np.ndarray

    @property
    def rest(self) -> float:
        """The probability of all other tokens together; 0 where none are left."""
        import numpy as np

        return max(0.0, 1.0 - math.fsum(np.exp(self.logprobs)))


class ProbeEngine(GgufEngine):
    """A GGUF file in llama.cpp, asked for distributions instead of answers.

    Args:
        letter: id of a token whose text is whole by itself. llama.cpp reports no probabilities of a position at which
            it has sampled the half of a character, so this is what it is made to sample.
        pure: see `GgufEngine`.
    """

    def __init__(self, path: Path, *, num_ctx: int, letter: int, pure: bool = True):
        super().__init__(path, num_ctx=num_ctx, pure=pure)
        self._bias = [[letter, FORCED]]

    def next_token(self, prefix: Sequence[int], top: int = TOP) -> Distribution:
        """The distribution of the token after `prefix`. Prefixes of one another cost only what is new in them.

        Raises:
            StepFailed: llama.cpp gave no distribution.
        """
        import numpy as np

        answer = self._complete(prefix, 1, n_probs=top, logprobs=top)
        try:
            (position,) = answer["choices"][0]["logprobs"]["content"]
            entries = position["top_logprobs"]
            ids = np.array([entry["id"] for entry in entries], dtype=np.int64)
            # A probability that rounds to nothing is reported as the least float32, or as null.
            found = [entry["logprob"] for entry in entries]
            logprobs = np.array([-math.inf if value is None else value for value in found], dtype=np.float64)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            problem = answer.get("error", {}).get("message") if isinstance(answer, dict) else None
            raise StepFailed(f"{self.name}: llama.cpp gave no distribution: {problem or repr(error)}") from error
        return Distribution(ids, logprobs)

    def tokens_per_second(self, prefix: Sequence[int], count: int = 16) -> float:
        """How fast `count` tokens are decoded after `prefix`."""
        timings = self._complete(prefix, count, ignore_eos=True).get("timings", {})
        return float(timings.get("predicted_per_second", 0.0))

    def read_by_chat(self, messages: Messages) -> int:
        """How many tokens a chat completion reads for these messages.

        Raises:
            StepFailed: llama.cpp cannot render them.
        """
        answer = self.complete(messages, max_new_tokens=1)
        if "usage" not in answer:
            raise StepFailed(f"{self.name}: llama.cpp cannot render the conversation: {_message(answer)}")
        return int(answer["usage"]["prompt_tokens"])

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The ids that a chat completion reads for these messages: rendered and tokenised by what the file says.

        Raises:
            StepFailed: llama.cpp cannot render them.
        """
        text = self.prompt({"messages": messages})
        # As its chat completions do: begin-of-text where the file asks for it, special tokens by their text.
        return self._post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def prompt(self, request: dict[str, Any]) -> str:
        """The text that a chat completion with this request (messages, tools, ...) reads, but for begin-of-text.

        Raises:
            StepFailed: llama.cpp cannot render it.
        """
        return str(self._post("/apply-template", request)["prompt"])

    def first_tokens(self, prefix: Sequence[int], top: int) -> dict[str, float]:
        """The likeliest tokens after `prefix` and their probabilities; those whose text is none are left out."""
        answer = self._complete(prefix, 1, n_probs=top, logprobs=top)
        (position,) = answer["choices"][0]["logprobs"]["content"]
        told = [(entry["token"], entry["logprob"]) for entry in position["top_logprobs"][:top]]
        return {text: math.exp(value) for text, value in told if value is not None and NO_CHARACTER not in text}

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer's first tokens, as far as their bytes are characters."""
        return str(self._post("/detokenize", {"tokens": list(ids)})["content"]).partition(NO_CHARACTER)[0]

    def _complete(self, prefix: Sequence[int], count: int, **options: Any) -> dict[str, Any]:
        request = {"prompt": list(prefix), "max_tokens": count, "temperature": 0, "cache_prompt": True}
        return self._server.handle_completions(request | {"logit_bias": self._bias} | options)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask what llama.cpp offers over HTTP alone; the server is our own, on the loopback interface."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        request = urllib.request.Request(self._server.listening_address + path, json.dumps(body).encode(), headers)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=TIMEOUT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise StepFailed(f"{self.name}: llama.cpp {path}: {_message(error.read())}") from error
        except (OSError, ValueError) as error:
            raise StepFailed(f"{self.name}: llama.cpp does not answer {path}: {error}") from error


def _message(answer: Any) -> str:
    """llama.cpp's own words in an error."""
    try:
        found = json.loads(answer) if isinstance(answer, bytes) else answer
        return str(found["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(answer)[:200]
