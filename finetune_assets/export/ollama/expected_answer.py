"""The answer of llama.cpp to a question with a GGUF file, against which a server of the file is checked.

Ollama brings a llama.cpp of its own, of another version or with kernels of its own, and computes the same model with
other rounding: where two tokens are nearly as likely, the two may choose differently, and go on differently. So the
answer is followed for as long as llama.cpp's own choices are clear, and only that much is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace

from finetune_assets.export.ollama.modelfile import OllamaModel
from finetune_assets.models.engines.engine import Messages
from finetune_assets.models.engines.llama_cpp_probe import NO_CHARACTER, ProbeEngine
from finetune_assets.models.formats.gguf import Head, read_head
from finetune_assets.reporting.errors import StepFailed

# The first whose answer llama.cpp ends by itself, without an unclear choice on the way, is the one that is asked.
QUESTIONS = ("Who are you?", "What is the capital of France?", "你好")
# Nats between the first choice and the second; two engines chose differently at 0.50 at most. Figures:
# docs/decisions.md#where-the-answers-of-two-llamacpp-engines-may-part
CLEAR = 1.0
LONGEST = 64  # tokens in which an ordinary short answer ends: the end is what shows that stop tokens are right
# Tokens compared of an answer that does not end. Each is one of tens of thousands: a wrong model does not guess them.
ENOUGH = 16
NUM_CTX = 2048  # Ollama's own, where a model has no num_ctx
TOLD = 20  # tokens of a distribution that an Ollama server tells at most
# Conversations that a TEMPLATE and the chat template that it was derived from may render differently: training has none
# of this kind.
PROBES: tuple[Messages, ...] = (
    [{"role": "user", "content": "Hi"}, {"role": "observer", "content": "x"}, {"role": "user", "content": "Go on"}],
    [{"role": "user", "content": "Hi"}, {"role": "system", "content": "x"}, {"role": "user", "content": "Go on"}],
    [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, {"role": "user", "content": "Hi"}],
)
SLACK = 8  # tokens a server may say more than llama.cpp before it is stopped


@dataclass(frozen=True)
class Expected:
    """A greedy answer, as far as it is clear.

    Attributes:
        prompt_tokens: of the whole prompt, the served system message included.
        text: the answer, or what of it is clear.
        tokens: in `text`, the one that ends it included.
        ends: whether the answer ends by itself there.
        system: the served system message.
        prompt: the whole prompt, as llama.cpp renders the file's chat template.
        first: the likeliest first tokens of the answer and their probabilities.
        probes: conversations that templates may render differently, and how llama.cpp renders them.
    """

    question: str
    prompt_tokens: int
    text: str
    tokens: int
    ends: bool
    system: str | None = field(default=None, compare=False)
    prompt: str = field(default="", compare=False)
    first: Mapping[str, float] = field(default_factory=dict, compare=False)
    probes: tuple[tuple[Messages, str], ...] = field(default=(), compare=False)

    @property
    def conversation(self) -> Messages:
        """The messages with the served system message, which a server adds by itself."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    @property
    def messages(self) -> Messages:
        return [{"role": "user", "content": self.question}]


def expected(model: OllamaModel) -> Expected:
    """Ask llama.cpp what the model's file answers.

    Raises:
        StepFailed: llama.cpp cannot load the file, or the system message leaves no room in the context.
    """
    num_ctx = int(model.parameters.get("num_ctx", NUM_CTX))
    said = [{"role": "system", "content": model.system}] if model.system else []
    # a prompt has no more tokens than bytes, words of the template included
    most = max(256, min(num_ctx, sum(len(message["content"].encode()) for message in said) + 1024))
    found: list[Expected] = []
    with closing(ProbeEngine(model.gguf, num_ctx=most, letter=_letter(read_head(model.gguf)))) as engine:
        probes = _rendered(engine, said)
        for question in QUESTIONS:
            messages = [*said, {"role": "user", "content": question}]
            prompt = engine.prompt_ids(messages)
            room = num_ctx - len(prompt) - SLACK
            if room < 1:
                raise StepFailed(
                    f"the system prompt and {question!r} take {len(prompt)} tokens of a context of {num_ctx}",
                    "raise ollama.num_ctx, or shorten the system prompt",
                )
            one = _follow(engine, question, messages, prompt, model.parameters.get("stop", []), room)
            text, first = engine.prompt({"messages": messages}), engine.first_tokens(prompt, TOLD)
            found.append(replace(one, system=model.system, prompt=text, first=first, probes=probes))
            if found[-1].ends:
                return found[-1]
    return max(found, key=lambda one: one.tokens)


def _rendered(engine: ProbeEngine, said: Messages) -> tuple[tuple[Messages, str], ...]:
    """Return the conversations of `PROBES` that the chat template renders, behind the served system message."""
    found: list[tuple[Messages, str]] = []
    for probe in PROBES:
        messages = [*said, *probe]
        with suppress(StepFailed):
            found.append((messages, engine.prompt({"messages": messages})))
    return tuple(found)


def _follow(
    engine: ProbeEngine, question: str, messages: Messages, prompt: list[int], stop: list[str], room: int
) -> Expected:
    choice = engine.complete(messages, max_new_tokens=min(LONGEST, room), stop=stop)
    count, ended = int(choice["usage"]["completion_tokens"]), choice["choices"][0]["finish_reason"] == "stop"
    wanted = count if ended else min(count, ENOUGH)
    ids: list[int] = []
    while len(ids) < wanted:
        first = engine.next_token([*prompt, *ids], top=2)
        if len(first.ids) > 1 and first.logprobs[0] - first.logprobs[1] < CLEAR:
            break
        ids.append(int(first.ids[0]))
    said = str(choice["choices"][0]["message"]["content"])
    if ended and len(ids) == count and NO_CHARACTER not in said:
        return Expected(question, len(prompt), said, count, True)
    text = engine.text(ids)
    return Expected(question, len(prompt), text, len(ids) if text else 0, False)


def _letter(head: Head) -> int:
    """Return a token that is a letter, whatever comes before it."""
    tokens = head.get("tokenizer.ggml.tokens", [])
    for letter in "aeiotns":
        if letter in tokens:
            return tokens.index(letter)
    raise StepFailed("the GGUF file's tokenizer knows no single letter: its answers cannot be followed")
