"""Answers of a Hugging Face folder in transformers."""

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
    """A Hugging Face folder (base or merged model), with an adapter on it if one is given.

    Args:
        template: the chat template of a base model that has none of its own.
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
        """The system prompt that the model was trained with, for callers who have no other."""
        return self._chat.default_system

    def stream(self, messages: Messages, *, max_new_tokens: int) -> Iterator[str]:
        """See `Engine.stream`."""
        prompt = encode_prompt(self._chat.tokenizer, messages)
        room = context_length(self._model)
        if room is not None and len(prompt) >= room:
            raise too_long(len(prompt), room)
        most = max_new_tokens if room is None else min(max_new_tokens, room - len(prompt))
        said: list[int] = []
        shown = ""
        began = None
        for [(_, token)] in greedy_steps(self._model, [prompt], self._chat.stop_token_ids, most):
            now = time.monotonic()
            began = began or now  # the first token came with the reading of the prompt
            self.speed = len(said) / (now - began) if now > began else None
            if token in self._chat.stop_token_ids:
                break
            said.append(token)
            text = self._text(said)
            # Bytes of an unfinished character decode to this mark: they wait for the rest of it.
            if text.endswith("\ufffd"):
                continue
            yield text[len(shown) :]
            shown = text
        if rest := self._text(said)[len(shown) :]:
            yield rest

    def _text(self, ids: list[int]) -> str:
        return str(self._chat.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def close(self) -> None:
        """See `Engine.close`."""
        self._model = None
