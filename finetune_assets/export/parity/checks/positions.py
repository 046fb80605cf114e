"""Positions in a text, as a GGUF file and the merged model compute them: rope base, rope scaling, context length.

The effect of a scaling appears in long texts, and held-out rows are short. So its values are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.export.parity.checks.architecture import PLAIN, architecture
from finetune_assets.export.parity.checks.failure import Failure
from finetune_assets.export.parity.checks.structure import same
from finetune_assets.models.formats.gguf import Head

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedConfig

FULL, SLIDING = "full_attention", "sliding_attention"
BASES = {"rope.freq_base": FULL, "rope.freq_base_swa": SLIDING}
ROPE_BASE = 10000.0  # llama.cpp's, where a file names none
SLOWER = "rope_freqs.weight"  # by how much each frequency is divided, where it is not the same for all
NEAR = 1e-4  # how far such a number may be from another computation of it in float32

Scaling = tuple[str, float, int | None]  # kind, factor, and for yarn the context length before
NONE: Scaling = ("none", 1.0, None)


def check_positions(head: Head, gguf: Path, config: PreTrainedConfig) -> list[Failure]:
    """Compare rope and context length of a file with those of transformers.

    Architectures outside `PLAIN` have scalings of their own, and their files may allow for longer contexts.

    Args:
        config: of the merged model, or of the part of it that reads text.
    """
    found = [*_bases(head, config), *_context(head, config)]
    return [*found, *_scaling(head, gguf, config)] if architecture(head) in PLAIN else found


def _rope(config: PreTrainedConfig, attention: str = FULL) -> Mapping[str, Any]:
    """Return the rope of layers of one kind; parameters without a kind are those of full attention."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        return rope.get(attention) or {}
    # a model's own code may have the older spelling
    older = {"rope_theta": getattr(config, "rope_theta", None), "rope_type": rope.get("type")}
    return {**older, **rope} if attention == FULL else {}


def _bases(head: Head, config: PreTrainedConfig) -> Iterator[Failure]:
    for key, attention in BASES.items():
        rope, found = _rope(config, attention), head.get(f"{architecture(head)}.{key}", ROPE_BASE)
        wanted = rope.get("rope_theta")
        if rope.get("rope_type") == "dynamic":  # a file holds the base that it comes to
            continue
        if wanted is not None and not same(found, wanted):
            yield Failure("rope base", f"{key} {_shown(found)}", f"{wanted:g}")


def _context(head: Head, config: PreTrainedConfig) -> Iterator[Failure]:
    wanted, found = getattr(config, "max_position_embeddings", None), head.get(f"{architecture(head)}.context_length")
    if wanted is None or found == wanted:
        return
    if architecture(head) in PLAIN or not isinstance(found, int) or found < wanted:
        yield Failure("context length", str(found), str(wanted))


def _scaling(head: Head, gguf: Path, config: PreTrainedConfig) -> Iterator[Failure]:
    """Compare the scaling: one factor, which a file names, or one for each frequency, which are a tensor."""
    rope = _rope(config)
    kind, wanted, found = rope.get("rope_type"), NONE, NONE
    if kind in ("linear", "yarn"):
        before = rope.get("original_max_position_embeddings") if kind == "yarn" else None
        wanted = (kind, float(rope.get("factor") or 1.0), before)
    named = head.get(f"{architecture(head)}.rope.scaling.type", "linear")
    factor = head.get(f"{architecture(head)}.rope.scaling.factor") or 1.0  # llama.cpp treats 0 as "no scaling"
    if named != "none" and (named, factor) != ("linear", 1.0):
        before = head.get(f"{architecture(head)}.rope.scaling.original_context_length") if named == "yarn" else None
        found = (named, factor, before)
    if found[::2] != wanted[::2] or not same(found[1], wanted[1]):
        yield Failure("rope scaling", _in_words(found), _in_words(wanted))
    yield from _frequencies(head, gguf, config if kind == "llama3" else None)


def _frequencies(head: Head, gguf: Path, config: PreTrainedConfig | None) -> Iterator[Failure]:
    """Compare the factors of single frequencies; `config` is None for a model without them."""
    import numpy as np

    tensor = next((tensor for tensor in head.tensors if tensor.name == SLOWER), None)
    if tensor is None or config is None:
        if tensor is not None or config is not None:
            has, should = ("no factors", "some") if tensor is None else ("factors", "none")
            yield Failure("rope scaling", f"{has} for single frequencies", f"{should}, as in the configuration")
        return
    found = np.fromfile(gguf, np.float32, tensor.elements, offset=head.data_start + tensor.offset)
    wanted = _factors(config)
    if len(found) != len(wanted):
        yield Failure("rope scaling", f"factors for {len(found)} frequencies", str(len(wanted)))
    elif not (near := np.isclose(found, wanted, rtol=NEAR)).all():
        at = int(near.argmin())
        yield Failure("rope scaling", f"frequency {at} divided by {found[at]:g}", f"{wanted[at]:g}")


def _factors(config: PreTrainedConfig) -> np.ndarray:
    """Return the number by which transformers divides each frequency. Shape (frequencies,)."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    places = torch.arange(len(slowed)) / len(slowed)
    return (_rope(config)["rope_theta"] ** -places / slowed).numpy()


def _in_words(scaling: Scaling) -> str:
    kind, factor, before = scaling
    return kind if scaling == NONE else f"{kind} by {_shown(factor)}" + (f" of {before} tokens" if before else "")


def _shown(number: Any) -> str:
    """Write a number without the noise of float32; anything else as it is."""
    return f"{number:.6g}" if isinstance(number, (int, float)) else str(number)
