"""Proof that a GGUF file is the merged model: its next-token distributions beside those of the merged model.

Greedy answers prove little about a small model: rounding turns one near-tie, and the rest of the text is another.
Distributions at given places say how far apart two models are, whatever they would say. So held-out conversations are
read by transformers and by llama.cpp, and compared where the assistant speaks: mean Kullback-Leibler divergence
KL(merged || GGUF) in nats, how often both have the same favourite, and the ratio of their perplexities on the words
that are there. What can be compared exactly is compared exactly (see exact_checks).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.chat.decoding import Chat, load_chat, load_model
from finetune_assets.chat.template import IGNORED, encode_prompt, encode_row, with_system
from finetune_assets.errors import StepFailed
from finetune_assets.export.exact_checks import EXACT, Failure, check_file, check_head, check_prompt
from finetune_assets.export.probe import Distribution, ProbeEngine
from finetune_assets.export.shards import Checkpoint

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from finetune_assets.device import Device, Precision

CHECKS = (*EXACT, "kl")
CONVERSATIONS = 8
POINTS = 64  # places compared, over all conversations
LONGEST = 512  # tokens of a conversation that are read
ROOM = 32  # tokens of context beside the longest conversation, for what is decoded to take the time

# Largest mean KL, in nats per token, at which a file still counts as the merged model. Published for a model of 8B on
# encyclopaedic text: q8_0 0.0014, q6_k 0.0055, q5_k_m 0.011, q4_k_m 0.031, q4_0 0.072, q3_k_m 0.10, q2_k 0.45. Small
# models suffer more (135M, rows of 576, for which K-quants fall back to others: q8_0 0.0046, q6_k 0.013, q5_k_m 0.16,
# q4_k_m 0.058, q4_0 0.28, q3_k_m 0.16, q2_k 0.51), and these leave room for them. The unquantised types differ by the
# rounding of activations and of llama.cpp's float16 cache only (0.00004; bf16 0.0002). Measured on one model
# only: gguf.max_kl overrides them. A file beyond its limit may still be made of the right weights: the demo's base was
# rounded to q4_1 once, and its tuned model in q4_1 is nearer to the base than to itself.
MAX_KL = {
    "f32": 0.001, "f16": 0.001, "bf16": 0.005, "q8_0": 0.02, "q6_k": 0.05, "q5_k_m": 0.25, "q5_k_s": 0.25,
    "q5_1": 0.25, "q5_0": 0.25, "q4_k_m": 0.3, "q4_k_s": 0.3, "q4_1": 0.5, "q4_0": 0.5, "q3_k_l": 0.75, "q3_k_m": 0.75,
    "q3_k_s": 1.0, "q2_k": 2.0,
}  # fmt: skip
HALF_PRECISION = 0.005  # what a merged model computed in bf16 or fp16 adds by its own rounding (0.001 for 135M)

# Where nothing is held out: any words will do to compare two models.
BUILT_IN = (
    ("What is the capital of France?", "The capital of France is Paris, a city on the river Seine."),
    ("Who are you?", "I am a helpful assistant. I answer questions and explain how things work."),
    ("请用一句话介绍你自己。", "我是一个乐于助人的助手，可以回答问题。"),
)
Progress = Callable[[dict[str, Any]], None]


TAIL = 1e-7  # of a probability: less is float32's rounding
LEAST = -50.0  # log probability of what llama.cpp says cannot be
_PRECISIONS: dict[str, Precision] = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}


@dataclass(frozen=True)
class Point:
    """A place in a conversation: all ids before it, and the id that is there."""

    prefix: tuple[int, ...]
    label: int


@dataclass(frozen=True)
class Conversation:
    """A held-out row.

    Attributes:
        prompt: all turns but the last answer, and their ids with the answer's header.
        ids: of the whole, up to `LONGEST`.
        places: in `ids`, which of them are points.
    """

    prompt: tuple[list[dict[str, str]], list[int]]
    ids: list[int]
    places: list[int]

    @property
    def points(self) -> list[Point]:
        return [Point(tuple(self.ids[:at]), self.ids[at]) for at in self.places]


@dataclass(frozen=True)
class Reference:
    """What the merged model makes of the held-out conversations.

    Attributes:
        settings: the merged model's chat.json.
        prompts: of each conversation all turns but the last answer, and the ids of that prompt.
        letter: id of a token that is text by itself.
        logprobs: of each point's next token, float32. Shape (points, vocabulary).
        precision: that the merged model was computed in.
    """

    merged: Path
    settings: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[tuple[list[dict[str, str]], list[int]]]
    points: Sequence[Point]
    letter: int
    logprobs: np.ndarray
    precision: Precision


@dataclass(frozen=True)
class Figures:
    """How near a GGUF file is to the merged model.

    Attributes:
        kl: mean KL(merged || GGUF) of the next token, nats.
        top1: share of the points at which both have the same favourite.
        ppl_ratio: perplexity of the GGUF at the points, divided by the merged model's.
        tokens_per_second: of decoding here, for information.
        points: places compared.
        reference: precision of the merged model's computation.
    """

    kl: float
    top1: float
    ppl_ratio: float
    tokens_per_second: float
    points: int
    reference: str


def prove(
    files: Mapping[str, Path],
    merged: Path,
    held_out: Path,
    *,
    device: Callable[[], Device],
    max_kl: Mapping[str, float],
    recorded: Mapping[str, Figures],
    trust_remote_code: bool = False,
    progress: Progress = lambda event: None,
) -> dict[str, Figures]:
    """Check every file against the merged model; its figures by type.

    Args:
        files: GGUF type -> file made of the merged model.
        merged: Hugging Face folder with chat.json.
        held_out: test.jsonl; where it has no rows, a few sentences of our own are compared.
        device: where the merged model is computed; asked for only if something has to be measured.
        max_kl: type -> largest mean KL, in place of `MAX_KL`.
        recorded: figures of files that passed all exact checks before, and are what they were.

    Raises:
        StepFailed: a file failed checks; the message names them, the type, what was found and what is allowed.
    """
    reference: Reference | None = None
    proven: dict[str, Figures] = {}
    for number, (kind, file) in enumerate(files.items(), 1):
        if kind in recorded:
            figures, failures = recorded[kind], []
        else:
            if reference is None:
                progress({"event": "message", "text": "reading held-out conversations with the merged model"})
                reference = refer(merged, held_out, device(), trust_remote_code=trust_remote_code)
            progress({"event": "message", "text": f"proving {kind} ({number} of {len(files)})"})
            figures, failures = examine(file, reference)
        if figures is not None:
            failures = [*failures, *judge(kind, figures, max_kl)]
            proven[kind] = figures
        if failures:
            raise _failed(kind, file, failures)
    return proven


def refer(merged: Path, held_out: Path, device: Device, *, trust_remote_code: bool = False) -> Reference:
    """Have the merged model read the held-out conversations; it is out of memory when this returns.

    Raises:
        StepFailed: the merged model cannot be loaded.
    """
    chat = load_chat(merged, trust_remote_code=trust_remote_code)
    rows = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines() if line.strip()]
    chosen = choose(rows, chat) or choose(_built_in(), chat)
    if not chosen:
        raise StepFailed(f"{merged}: the chat template leaves no words of an answer to compare models by")
    device = suited(device, merged)
    return Reference(
        merged=merged,
        settings=json.loads((merged / "chat.json").read_text(encoding="utf-8")),
        tokenizer=chat.tokenizer,
        prompts=[conversation.prompt for conversation in chosen],
        points=[point for conversation in chosen for point in conversation.points],
        letter=_letter(chat.tokenizer),
        logprobs=_read(merged, chosen, device, trust_remote_code),
        precision=device.precision,
    )


def choose(rows: Sequence[Mapping[str, Any]], chat: Chat) -> list[Conversation]:
    """Up to `CONVERSATIONS` of the rows by their ids, with `POINTS` points in their last answers between them."""
    encoded = []
    for row in sorted(rows, key=lambda row: row["id"]):
        turns = with_system(row["messages"], chat.default_system)
        ids, labels = _encoded(chat.tokenizer, turns)
        if places := [at for at in range(1, len(ids)) if labels[at] != IGNORED]:
            encoded.append((turns[:-1], ids, places))
        if len(encoded) == CONVERSATIONS:
            break
    counts = shares([len(places) for _, _, places in encoded], POINTS)
    conversations: list[Conversation] = []
    for (turns, ids, places), count in zip(encoded, counts, strict=True):
        at = [places[number * len(places) // count] for number in range(count)]
        conversations.append(Conversation((turns, encode_prompt(chat.tokenizer, turns)), ids, at))
    return conversations


def shares(sizes: Sequence[int], total: int) -> list[int]:
    """How many of `total` each gets that has so many to give: all the same, as far as they have them."""
    given = [0] * len(sizes)
    left = total
    for waiting, number in zip(range(len(sizes), 0, -1), sorted(range(len(sizes)), key=sizes.__getitem__), strict=True):
        given[number] = min(sizes[number], left // waiting)
        left -= given[number]
    return given


def suited(device: Device, merged: Path) -> Device:
    """The device in the best precision in which the merged model fits its memory, float32 if it can be."""
    with Checkpoint(merged) as checkpoint:
        specs = [checkpoint.spec(name) for name in checkpoint]
    weights: Counter[str] = Counter()
    for spec in specs:
        weights[spec.dtype] += math.prod(spec.shape)
    own = _PRECISIONS.get(weights.most_common(1)[0][0], "fp32")
    fits = weights.total() * 4 < 0.7 * device.memory_gib * 2**30
    return dataclasses.replace(device, precision="fp32" if fits else own)


def examine(file: Path, reference: Reference) -> tuple[Figures | None, list[Failure]]:
    """All checks of one file but that of its KL; no figures for a file that llama.cpp cannot run."""
    head, failures = check_file(file)
    if head is None:
        return None, failures
    failures = check_head(head, file, reference.merged, reference.settings, reference.tokenizer)
    longest = max(len(point.prefix) for point in reference.points)
    try:
        with closing(ProbeEngine(file, num_ctx=longest + ROOM, letter=reference.letter)) as engine:
            failures += _prompts(engine, reference, longest)
            return _measure(engine, reference), failures
    except StepFailed as error:
        return None, [*failures, Failure("file", error.message, "one that llama.cpp runs")]


def judge(kind: str, figures: Figures, max_kl: Mapping[str, float]) -> list[Failure]:
    """Whether a type's KL is one that its rounding explains (check `kl`)."""
    allowed = max_kl.get(kind, MAX_KL[kind] + (0 if figures.reference == "fp32" else HALF_PRECISION))
    if figures.kl <= allowed:  # not so for NaN
        return []
    return [Failure("kl", f"mean KL divergence {figures.kl:.4g} nats per token", f"{allowed:g}")]


def divergence(ours: np.ndarray, theirs: Distribution) -> float:
    """KL(ours || theirs) in nats; tokens that llama.cpp did not tell are one outcome together.

    Grouping outcomes can only make it smaller, and by next to nothing where the tail is thin.

    Args:
        ours: log probabilities of every token. Shape (vocabulary,).
    """
    import numpy as np

    known = theirs.ids < len(ours)  # a file may have a larger vocabulary, which is another check's finding
    told = ours[theirs.ids[known]].astype(np.float64)
    chances = np.exp(told)
    total = float(np.sum(chances * (told - np.maximum(theirs.logprobs[known], LEAST))))
    if len(theirs.ids) < len(ours):
        rest, other = max(0.0, 1.0 - float(chances.sum())), max(theirs.rest, TAIL)
        if rest > TAIL:
            total += rest * math.log(rest / other)
    return max(0.0, total) if not math.isnan(total) else math.inf


def _encoded(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Ids and labels. Only the last answer's: it has labels with every template."""
    encoded = encode_row(tokenizer, turns, cutoff_len=LONGEST, mask_history=True)
    return encoded.input_ids, encoded.labels


def _built_in() -> list[dict[str, Any]]:
    return [
        {
            "id": str(number),
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}],
        }
        for number, (asked, answer) in enumerate(BUILT_IN)
    ]


def _letter(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token that is a letter, whatever comes before it."""
    for letter in "aeiotns":
        ids = tokenizer(letter, add_special_tokens=False)["input_ids"]
        if isinstance(ids, list) and ids and str(tokenizer.decode([ids[-1]])).strip() == letter:
            return ids[-1]
    raise StepFailed("the tokenizer knows no single letter: its GGUF files cannot be compared with the model")


def _read(merged: Path, chosen: Sequence[Conversation], device: Device, trust_remote_code: bool) -> np.ndarray:
    """Log probabilities of the next token at each point, as the merged model has them. Shape (points, vocabulary)."""
    import numpy as np
    import torch

    model = load_model(merged, None, device, trust_remote_code=trust_remote_code)
    found: list[np.ndarray] = []
    for conversation in chosen:
        last = conversation.places[-1]
        ids = torch.tensor([conversation.ids[:last]], device=model.device)
        keep = torch.tensor([at - 1 for at in conversation.places], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0]
            found.append(torch.log_softmax(logits.float(), -1).cpu().numpy())
    return np.concatenate(found)


def _prompts(engine: ProbeEngine, reference: Reference, longest: int) -> list[Failure]:
    """The first prompt that llama.cpp reads otherwise."""
    bos = reference.tokenizer.bos_token_id
    counted = False
    for turns, ids in reference.prompts:
        read = None
        if not counted and len(ids) <= longest:  # once will do: a chat completion reads what /tokenize says
            read, counted = engine.read_by_chat(turns), True
        if failures := check_prompt(ids, engine.prompt_ids(turns), read, bos if isinstance(bos, int) else None):
            return failures
    return []


def _measure(engine: ProbeEngine, reference: Reference) -> Figures:
    import numpy as np

    divergences: list[float] = []
    same = 0
    surprise = 0.0  # nats more than the merged model's, over all points
    for point, ours in zip(reference.points, reference.logprobs, strict=True):
        theirs = engine.next_token(point.prefix)
        divergences.append(divergence(ours, theirs))
        same += int(theirs.ids[0]) == int(ours.argmax())
        surprise += float(ours[point.label]) - _logprob(point.label, theirs, len(ours))
    return Figures(
        kl=round(float(np.mean(divergences)), 7),
        top1=round(same / len(divergences), 4),
        ppl_ratio=round(math.exp(min(surprise / len(divergences), 100.0)), 5),
        tokens_per_second=round(engine.tokens_per_second(reference.points[-1].prefix), 1),
        points=len(divergences),
        reference=reference.precision,
    )


def _logprob(token: int, theirs: Distribution, vocabulary: int) -> float:
    """A token's log probability; one that llama.cpp did not tell gets an equal part of the rest."""
    import numpy as np

    if len(found := np.flatnonzero(theirs.ids == token)):
        return max(float(theirs.logprobs[found[0]]), LEAST)
    return math.log(max(theirs.rest, TAIL) / max(1, vocabulary - len(theirs.ids)))


def _failed(kind: str, file: Path, failures: Sequence[Failure]) -> StepFailed:
    listing = "\n".join(f"  check {failure}" for failure in failures)
    if all(failure.check == "kl" for failure in failures):
        hint = f"take {kind} out of gguf.types if that is too far, or allow it: gguf.max_kl: {{{kind}: ...}}"
    else:
        hint = "nothing was published; make it again, or set LLAMA_CPP_DIR to another llama.cpp to convert with"
    return StepFailed(f"the GGUF file {file.name} ({kind}) is not the merged model:\n{listing}", hint)
