"""The engine for Hugging Face folders: transformers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.chat.template import encode_prompt
from finetune_assets.chat.template_limits import prove_folder
from finetune_assets.models.decoding import greedy_steps
from finetune_assets.models.engines.engine import Messages, too_long
from finetune_assets.models.loading import context_length, load_chat, load_model

if TYPE_CHECKING:
    from finetune_assets.machine.device import Device


class TransformersEngine:
    """A Hugging Face folder (base or merged model), with an optional adapter.

    Args:
        template: the chat template for a base model that does not have one.
    """

    def __init__(
        self,
        folder: Path,
        adapter: Path | None,
        device: Device,
        *,
        template: str = "auto",
        trust_remote_code: bool = False,
    ):
        self.name = f"{folder.name} + {adapter.name}" if adapter else folder.name
        self.speed: float | None = None
        prove_folder(adapter or folder, None)
        self._chat = load_chat(adapter or folder, template=template, trust_remote_code=trust_remote_code)
        self._model: Any = load_model(folder, adapter, device, trust_remote_code=trust_remote_code)

    @property
    def default_system(self) -> str | None:
        """Return the system prompt that the model was trained with, as a default for callers."""
        return self._chat.default_system

    def stream(self, messages: Messages, *, max_new_tokens: int) -> Iterator[str]:
        """See `Engine.stream`."""
        prompt = encode_prompt(self._chat.tokenizer, messages)
        room = context_length(self._model)
        if room is not None and len(prompt) >= room:
            raise too_long(len(prompt), room)
        limit = max_new_tokens if room is None else min(max_new_tokens, room - len(prompt))
        answer: list[int] = []
        shown = ""
        began = None
        for [(_, token)] in greedy_steps(self._model, [prompt], self._chat.stop_token_ids, limit):
            now = time.monotonic()
            began = began or now  # the first token includes the time to read the prompt
            self.speed = len(answer) / (now - began) if now > began else None
            if token in self._chat.stop_token_ids:
                break
            answer.append(token)
            text = self._text(answer)
            # Bytes of an incomplete character decode to this mark: wait for the rest of the character.
            if text.endswith("\ufffd"):
                continue
            yield text[len(shown) :]
            shown = text
        if rest := self._text(answer)[len(shown) :]:
            yield rest

    def _text(self, ids: list[int]) -> str:
        return str(self._chat.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def close(self) -> None:
        """See `Engine.close`."""
        self._model = None
