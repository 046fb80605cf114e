"""Detection of how a server serves a model: which template renders the prompts, what it stores, what it reports.

It compares what the server does where servers differ, and otherwise relies on the version. Servers before 0.30
always use TEMPLATE. Later ones choose between TEMPLATE and the GGUF file's chat template, and return a rendered
prompt for `_debug_render_only`. Conversations that the two render differently show which one the server uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_assets.export.ollama import weights as ollama_weights
from finetune_assets.export.ollama.expected_answer import Expected
from finetune_assets.export.ollama.modelfile import OllamaModel
from finetune_assets.export.ollama.server import api as ollama_server
from finetune_assets.export.ollama.server.releases import CHOOSES, release
from finetune_assets.export.ollama.template.choice import served_by
from finetune_assets.models.engines.engine import Messages
from finetune_assets.models.formats.gguf import read_head

PATIENCE = 600.0  # seconds: the server loads the model
TEMPLATE, JINJA = "TEMPLATE", "the chat template in the GGUF file (Jinja)"
ALIKE, OTHER = "TEMPLATE or the chat template (Jinja), which render alike", "neither TEMPLATE nor the chat template"
UNKNOWN = "a template that the server does not tell"


@dataclass(frozen=True)
class Behaviour:
    """How a server serves a model.

    Attributes:
        prompts: what renders the prompts, as text.
        weights: how the server stores the weights, as text.
        digest: of the stored weights (hex), if the server reports it.
        prompt: the rendered prompt of the question, if the server reports it.
    """

    version: str
    prompts: str
    weights: str
    digest: str | None
    prompt: str | None = None

    @property
    def leaves_out_cached(self) -> bool:
        """Return whether it may count only prompt tokens that are not cached, as the first 0.30 releases do."""
        number = release(self.version)
        return number is not None and number[:2] == CHOOSES[:2]

    def __str__(self) -> str:
        return f"Ollama {self.version}: prompts by {self.prompts}, weights {self.weights}"


def behaviour(
    host: str, version: str, name: str, model: OllamaModel, expected: Expected, *, keep_alive: float | None = None
) -> Behaviour:
    """Detect how a server serves `model` under a name.

    Args:
        keep_alive: seconds for which the model stays in the server's memory; None: the server's default.

    Raises:
        OSError: the server does not answer, or its answer cannot be read.
    """
    digest = ollama_weights.source_of(ollama_server.show(host, name))
    weights = "as sent" if digest == model.sha256 else "in a copy of its own"
    if (number := release(version)) is not None and number < CHOOSES:
        return Behaviour(version, TEMPLATE, weights, digest)
    prompt = rendered(host, name, expected.messages, keep_alive)
    prompts = UNKNOWN if prompt is None else _rendered_by(host, name, model, expected, prompt)
    if prompts in (ALIKE, UNKNOWN):
        prompts += f"; {_predicted(version, model)} by the rule of its release"
    return Behaviour(version, prompts, weights, digest, prompt)


def rendered(host: str, name: str, messages: Messages, keep_alive: float | None = None) -> str | None:
    """Return the prompt that a server renders from a conversation; None if the server does not report it.

    A server that does not support `_debug_render_only` generates an answer of one token instead.
    """
    request: dict[str, Any] = {"model": name, "messages": messages, "stream": False, "_debug_render_only": True}
    request |= {"options": {"num_predict": 1}, **({} if keep_alive is None else {"keep_alive": keep_alive})}
    answer = ollama_server.ask(host, "/api/chat", PATIENCE, request)
    prompt = (answer.get("_debug_info") or {}).get("rendered_template")
    return prompt if isinstance(prompt, str) else None


def _rendered_by(host: str, name: str, model: OllamaModel, expected: Expected, prompt: str) -> str:
    """Return which of the two templates renders the server's prompts."""
    samples = [(expected.conversation, expected.prompt, prompt)]
    for messages, jinja in expected.probes:
        # a conversation that the server refuses to render shows nothing
        if (served := _rendered_or_none(host, name, messages)) is not None:
            samples.append((messages, jinja, served))
    by_go = [_by_template(model, messages) in (None, served) for messages, _, served in samples]
    by_jinja = [jinja == served for _, jinja, served in samples]
    if all(by_go) and all(by_jinja):
        return ALIKE
    if all(by_go):
        return TEMPLATE
    return JINJA if all(by_jinja) else OTHER


def _predicted(version: str, model: OllamaModel) -> str:
    """Return what renders the model's prompts on a server of this version, according to Ollama's source."""
    head = read_head(model.gguf)
    jinja, architecture = head.get("tokenizer.chat_template"), str(head.get("general.architecture"))
    try:
        choice = served_by(version, model.template, jinja, architecture)
    except ValueError:
        return "not to be said"
    return {"template": TEMPLATE, "jinja": "the chat template", "server": "code of its own"}[choice.path]


def _rendered_or_none(host: str, name: str, messages: Messages) -> str | None:
    try:
        return rendered(host, name, messages)
    except OSError:
        return None


def _by_template(model: OllamaModel, messages: Messages) -> str | None:
    """Return what the model's TEMPLATE renders; None if it uses more of Go's language than `go_eval` covers."""
    from finetune_assets.export.ollama.template.derive import go_data
    from finetune_assets.export.ollama.template.go_eval import render

    try:
        return render(model.template, go_data(messages))
    except (ValueError, LookupError, TypeError):
        return None
