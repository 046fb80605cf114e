"""The check before training that llama.cpp tokenises prompts exactly as training does.

The tokenizer's metadata and the chat template decide it. So a file with these and almost no weights gives the same
result as the finished model's file.
"""

from __future__ import annotations

import tempfile
from contextlib import closing
from pathlib import Path

from finetune_assets.chat.pinning import pinned
from finetune_assets.chat.template import resolve_template, stop_tokens
from finetune_assets.chat.tokenizer import load_tokenizer
from finetune_assets.export.gguf.bare_file import CONTEXT, write_bare
from finetune_assets.export.gguf.chat_metadata import adds_bos, corrected, special_tokens
from finetune_assets.export.ollama.template.proof import prove
from finetune_assets.export.parity.checks.prompts import check_prompt
from finetune_assets.export.parity.held_out import choose
from finetune_assets.models.engines.llama_cpp_probe import ProbeEngine
from finetune_assets.models.formats.gguf import STRING, Head, read_head
from finetune_assets.models.loading import Chat
from finetune_assets.recipe import ModelSection
from finetune_assets.reporting.errors import StepFailed

HINT = "nothing was trained; name a chat template that servers follow under model.template (chatml, say)"


def rehearse(vocabulary: Path, base: Path, rows: Path, model: ModelSection) -> None:
    """Compare the ids of prompts, and the texts that each kind of Ollama server makes of conversations.

    Args:
        vocabulary: a GGUF file of the base model's tokenizer, without weights.
        base: Hugging Face folder.
        rows: conversations (.jsonl), of which a few are rendered; if it has none, a few built-in sentences.
        model: says which chat template is trained with.

    Raises:
        BadInput: there is no chat template, or it does not take the rows.
        StepFailed: the two tokenise a prompt differently (the message says which ids), or servers of some release
            would render ordinary conversations differently from training.
    """
    tokenizer = load_tokenizer(base, trust_remote_code=model.trust_remote_code)
    tokenizer.chat_template = pinned(resolve_template(model.template, tokenizer))
    chat = Chat(tokenizer, model.default_system, stop_tokens(tokenizer, tokenizer.chat_template))
    bos = tokenizer.bos_token_id
    template = read_head(vocabulary).with_value("tokenizer.chat_template", STRING, str(tokenizer.chat_template))
    head = corrected(template, chat.stop_token_ids)
    with tempfile.TemporaryDirectory(prefix="finetune-rehearsal-") as temporary:
        file = Path(temporary) / "rehearsal.gguf"
        write_bare(head, file)
        with closing(ProbeEngine(file, num_ctx=CONTEXT, letter=0, pure=False)) as engine:
            for conversation in choose(rows, chat):
                turns, ids = conversation.prompt
                if failures := check_prompt(ids, engine.prompt_ids(turns), None, bos if isinstance(bos, int) else None):
                    listing = "\n".join(f"  check {failure}" for failure in failures)
                    raise StepFailed(
                        f"llama.cpp would not read this model's prompts as training does:\n{listing}",
                        "nothing was trained; another model.template may help, or the base model's tokenizer files "
                        "do not belong together",
                    )
            _check_servers(engine, head, model.default_system)


def _check_servers(engine: ProbeEngine, head: Head, system: str | None) -> None:
    """Raise StepFailed if servers of some release would render ordinary conversations differently from training."""
    try:
        proof = prove(
            engine,
            str(head.get("tokenizer.chat_template")),
            special_tokens(head),
            add_bos=adds_bos(head),
            architecture=str(head.get("general.architecture")),
            system=system,
        )
    except StepFailed as refused:
        raise StepFailed(refused.message, HINT) from refused
    if proof.problem is not None:
        raise StepFailed(proof.problem, HINT)
