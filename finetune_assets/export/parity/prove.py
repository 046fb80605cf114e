"""Proof that a GGUF file is the merged model: its next-token distributions compared with the merged model's.

Greedy answers prove little about a small model: rounding decides one near-tie, and the rest of the text differs.
Distributions at given positions measure how far apart two models are, whatever they would answer. So transformers and
llama.cpp read held-out conversations, and are compared where the assistant speaks: mean Kullback-Leibler divergence
KL(merged || GGUF) in nats, top-1 agreement, and the ratio of their perplexities on the given text. What can be compared
exactly is compared exactly (see `checks`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.export.parity.checks.failure import Failure
from finetune_assets.export.parity.checks.positions import check_positions
from finetune_assets.export.parity.checks.prompts import check_prompt
from finetune_assets.export.parity.checks.structure import EXACT, check_file, check_head
from finetune_assets.export.parity.checks.vocabulary import check_vocabulary
from finetune_assets.export.parity.checks.weights import check_weights
from finetune_assets.export.parity.held_out import LONGEST, Point, choose, logits
from finetune_assets.export.parity.limits import Figures, judge
from finetune_assets.models.engines.llama_cpp_probe import Distribution, ProbeEngine
from finetune_assets.models.formats.gguf import Head
from finetune_assets.models.loading import context_length, load_chat, load_model, suited
from finetune_assets.recipe.gguf_types import UNQUANTISED
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.reporting.events import Progress, message, silent

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from finetune_assets.machine.device import Device, Precision

CHECKS = (*EXACT, "kl")


ROOM = 32  # tokens of context besides the longest conversation, in which decoding is timed
TAIL = 1e-7  # of a probability: less is below the precision of float32
LEAST = -50.0  # log probability of a token that llama.cpp finds impossible


@dataclass(frozen=True)
class Reference:
    """The merged model's distributions in the held-out conversations.

    Attributes:
        config: of the merged model, or of the part of it that reads text.
        settings: the merged model's chat.json.
        prompts: of each conversation all turns but the last answer, and the ids of that prompt.
        letter: id of a token that is text by itself.
        logprobs: of each point's next token, float32. Shape (points, vocabulary).
        precision: that the merged model was computed in.
    """

    merged: Path
    config: PreTrainedConfig
    settings: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[tuple[list[dict[str, str]], list[int]]]
    points: Sequence[Point]
    letter: int
    logprobs: np.ndarray
    precision: Precision


def prove(
    files: Mapping[str, Path],
    merged: Path,
    held_out: Path,
    *,
    device: Callable[[], Device],
    max_kl: Mapping[str, float],
    recorded: Mapping[str, Figures],
    written: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> dict[str, Figures]:
    """Check every file against the merged model, and return its figures by type.

    Args:
        files: GGUF type -> file made of the merged model.
        merged: Hugging Face folder with chat.json.
        held_out: test.jsonl; if it has no rows, a few built-in sentences are compared.
        device: where the merged model is computed; asked for only if something has to be measured.
        max_kl: type -> largest mean KL, in place of `MAX_KL`.
        recorded: figures of files that passed all exact checks before, and are what they were.
        written: type -> sha256 (hex) of the file as it was made.

    Raises:
        StepFailed: files failed checks; the message names the type, the checks, what they measured and what is allowed.
    """
    reference: Reference | None = None
    proven: dict[str, Figures] = {}
    errors: list[StepFailed] = []
    for number, (kind, file) in enumerate(files.items(), 1):
        if kind in recorded:
            figures, failures = recorded[kind], []
        else:
            if reference is None:
                progress(message("reading held-out conversations with the merged model"))
                reference = refer(merged, held_out, device(), trust_remote_code=trust_remote_code)
            progress(message(f"proving {kind} ({number} of {len(files)})"))
            figures, failures = examine(file, reference, sha256=(written or {}).get(kind))
        if figures is not None:
            failures = [*failures, *judge(kind, figures, max_kl)]
            proven[kind] = figures
        if failures:
            errors.append(refusal(kind, file, figures, failures))
    if errors:  # all at once: making the files again to find the next one takes long
        hints = dict.fromkeys(error.hint for error in errors if error.hint)
        raise StepFailed("\n".join(error.message for error in errors), "\n".join(hints))
    return proven


def refer(merged: Path, held_out: Path, device: Device, *, trust_remote_code: bool = False) -> Reference:
    """Compute the merged model's distributions; the model is out of memory when this returns.

    Raises:
        StepFailed: the merged model cannot be loaded.
    """
    import torch

    chat = load_chat(merged, trust_remote_code=trust_remote_code)
    device = suited(device, merged)
    model = load_model(merged, None, device, trust_remote_code=trust_remote_code)
    # llama.cpp reads no more than the context holds
    room = context_length(model) or LONGEST + ROOM
    chosen = choose(held_out, chat, longest=min(LONGEST, max(1, room - ROOM)))
    said = logits(model, chosen)
    return Reference(
        merged=merged,
        config=model.config.get_text_config(),
        settings=json.loads((merged / "chat.json").read_text(encoding="utf-8")),
        tokenizer=chat.tokenizer,
        prompts=[conversation.prompt for conversation in chosen],
        points=[point for conversation in chosen for point in conversation.points],
        letter=_letter(chat.tokenizer),
        logprobs=torch.log_softmax(torch.cat(said), -1).numpy(),
        precision=device.precision,
    )


def examine(file: Path, reference: Reference, *, sha256: str | None = None) -> tuple[Figures | None, list[Failure]]:
    """Return the figures of one file and its failed checks, except `kl`; no figures if llama.cpp cannot run the file.

    Args:
        sha256: of the file as it was made (hex): no other check sees a changed bit of a coarse weight. A file of
            different content is not read further: llama.cpp ends the whole process over some of them.
    """
    head, failures = check_file(file, sha256)
    if head is None or failures:
        return None, failures
    failures += check_content(head, file, reference)
    longest = max(len(point.prefix) for point in reference.points)
    try:
        with closing(ProbeEngine(file, num_ctx=longest + ROOM, letter=reference.letter)) as engine:
            failures += _prompts(engine, reference, longest)
            return _measure(engine, reference), failures
    except StepFailed as error:
        return None, [*failures, Failure("file", error.message, "one that llama.cpp runs")]


def check_content(head: Head, file: Path, reference: Reference) -> list[Failure]:
    """Return the failed checks of a file's content, without running it."""
    merged, config, tokenizer = reference.merged, reference.config, reference.tokenizer
    return [
        *check_head(head, merged, config, reference.settings, tokenizer),
        *check_vocabulary(head, merged, config, tokenizer),
        *check_positions(head, file, config),
        *check_weights(head, file, merged),
    ]


def divergence(ours: np.ndarray, theirs: Distribution) -> float:
    """Return KL(ours || theirs) in nats; tokens that llama.cpp did not report count as one outcome.

    Grouping outcomes can only make it smaller, and only slightly where the tail is thin.

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


def _letter(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of a token that is a single letter, whatever comes before it."""
    for letter in "aeiotns":
        ids = tokenizer(letter, add_special_tokens=False)["input_ids"]
        if isinstance(ids, list) and ids and str(tokenizer.decode([ids[-1]])).strip() == letter:
            return ids[-1]
    raise StepFailed("the tokenizer knows no single letter: its GGUF files cannot be compared with the model")


def _prompts(engine: ProbeEngine, reference: Reference, longest: int) -> list[Failure]:
    """Return the failures of the first prompt that llama.cpp tokenises differently."""
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
    """Return a token's log probability; one that llama.cpp did not report gets an equal part of the rest."""
    import numpy as np

    if len(found := np.flatnonzero(theirs.ids == token)):
        return max(float(theirs.logprobs[found[0]]), LEAST)
    return math.log(max(theirs.rest, TAIL) / max(1, vocabulary - len(theirs.ids)))


def refusal(kind: str, file: Path, figures: Figures | None, failures: Sequence[Failure]) -> StepFailed:
    """Return the error of a file that failed checks: it names each check, and says what to do."""
    listing = "\n".join(f"  check {failure}" for failure in failures)
    if figures is None or kind in UNQUANTISED or any(failure.check != "kl" for failure in failures):
        hint = "nothing was published; make it again, or set LLAMA_CPP_DIR to another llama.cpp to convert with"
        return StepFailed(f"the GGUF file {file.name} ({kind}) is not the merged model:\n{listing}", hint)
    # the right weights, quantised until the model answers differently
    much = f"top-1 agreement {figures.top1:.0%}, perplexity ratio {figures.ppl_ratio:.2f}"
    hint = f"take {kind} out of gguf.types for one that is nearer"
    if math.isfinite(figures.kl):
        hint += f", or say that you want it: gguf.max_kl: {{{kind}: {_rounded_up(figures.kl)}}}"
    return StepFailed(f"{kind} is too coarse for this model ({file.name}):\n{listing} ({much})", hint)


def _rounded_up(value: float) -> str:
    """Round up to two digits, with some room: llama.cpp's figures differ slightly between machines."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value * 1.05 / unit) * unit:.6g}"
