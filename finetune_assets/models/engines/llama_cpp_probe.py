"""Token ids and next-token distributions of a GGUF file in llama.cpp, for the export checks."""

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

# Tokens of a distribution that llama.cpp reports; the remaining probability counts as one more outcome. A whole
# vocabulary would be megabytes of JSON for each position, and its tail has almost no probability.
TOP = 2000
# Outweighs any logit, so the token with this bias is sampled. The reported distribution is without the bias.
FORCED = 1000
NO_CHARACTER = "\ufffd"  # replaces bytes that are not a character
TIMEOUT = 60.0  # seconds, enough for a tokenizer


@dataclass(frozen=True)
class Distribution:
    """llama.cpp's next-token distribution.

    Attributes:
        ids: token ids, the likeliest first. Shape (n,), n at most `TOP`.
        logprobs: natural logarithms of their probabilities, float64. Shape (n,).
    """

    ids: np.ndarray
    logprobs: np.ndarray

    @property
    def rest(self) -> float:
        """Return the total probability of all other tokens; 0 if there are none."""
        import numpy as np

        return max(0.0, 1.0 - math.fsum(np.exp(self.logprobs)))


class ProbeEngine(GgufEngine):
    """A GGUF file in llama.cpp that reports distributions in addition to answers.

    Args:
        letter: id of a token whose text is a complete character. llama.cpp reports no probabilities for a position
            at which it sampled part of a character, so it is forced to sample this token.
        pure: see `GgufEngine`.
    """

    def __init__(self, path: Path, *, num_ctx: int, letter: int, pure: bool = True):
        super().__init__(path, num_ctx=num_ctx, pure=pure)
        self._bias = [[letter, FORCED]]

    def next_token(self, prefix: Sequence[int], top: int = TOP) -> Distribution:
        """Return the distribution of the token after `prefix`. Only what is new since the last prefix is computed.

        Raises:
            StepFailed: llama.cpp did not return a distribution.
        """
        import numpy as np

        answer = self._complete(prefix, 1, n_probs=top, logprobs=top)
        try:
            (position,) = answer["choices"][0]["logprobs"]["content"]
            entries = position["top_logprobs"]
            ids = np.array([entry["id"] for entry in entries], dtype=np.int64)
            # A probability that rounds to zero is reported as the smallest float32, or as null.
            values = [entry["logprob"] for entry in entries]
            logprobs = np.array([-math.inf if value is None else value for value in values], dtype=np.float64)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            problem = answer.get("error", {}).get("message") if isinstance(answer, dict) else None
            raise StepFailed(f"{self.name}: llama.cpp returned no distribution: {problem or repr(error)}") from error
        return Distribution(ids, logprobs)

    def tokens_per_second(self, prefix: Sequence[int], count: int = 16) -> float:
        """Measure how fast `count` tokens are decoded after `prefix`."""
        timings = self._complete(prefix, count, ignore_eos=True).get("timings", {})
        return float(timings.get("predicted_per_second", 0.0))

    def read_by_chat(self, messages: Messages) -> int:
        """Count the tokens that a chat completion reads for these messages.

        Raises:
            StepFailed: llama.cpp cannot render them.
        """
        answer = self.complete(messages, max_new_tokens=1)
        if "usage" not in answer:
            raise StepFailed(f"{self.name}: llama.cpp cannot render the conversation: {_message(answer)}")
        return int(answer["usage"]["prompt_tokens"])

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Return the ids that a chat completion reads, rendered and tokenised as the file says.

        Raises:
            StepFailed: llama.cpp cannot render them.
        """
        text = self.prompt({"messages": messages})
        # As in its chat completions: begin-of-text if the file asks for it, special tokens recognised by their text.
        return self._post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def prompt(self, request: dict[str, Any]) -> str:
        """Return the text that a chat completion reads for a request (messages, tools, ...), without begin-of-text.

        Raises:
            StepFailed: llama.cpp cannot render it.
        """
        return str(self._post("/apply-template", request)["prompt"])

    def first_tokens(self, prefix: Sequence[int], top: int) -> dict[str, float]:
        """Return the likeliest tokens after `prefix` with their probabilities, without those that are not text."""
        answer = self._complete(prefix, 1, n_probs=top, logprobs=top)
        (position,) = answer["choices"][0]["logprobs"]["content"]
        likely = [(entry["token"], entry["logprob"]) for entry in position["top_logprobs"][:top]]
        return {text: math.exp(value) for text, value in likely if value is not None and NO_CHARACTER not in text}

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of an answer's first tokens, up to the first incomplete character."""
        return str(self._post("/detokenize", {"tokens": list(ids)})["content"]).partition(NO_CHARACTER)[0]

    def _complete(self, prefix: Sequence[int], count: int, **options: Any) -> dict[str, Any]:
        request = {"prompt": list(prefix), "max_tokens": count, "temperature": 0, "cache_prompt": True}
        return self._server.handle_completions(request | {"logit_bias": self._bias} | options)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Call a function that llama.cpp offers over HTTP only; the server is this engine's own, on loopback."""
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
    """Return the message of a llama.cpp error."""
    try:
        body = json.loads(answer) if isinstance(answer, bytes) else answer
        return str(body["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(answer)[:200]
