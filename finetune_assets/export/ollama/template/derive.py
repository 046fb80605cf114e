"""An Ollama TEMPLATE, in Go's template language, derived from a Jinja chat template, with a proof.

Ollama before 0.30 cannot run Jinja. Without a TEMPLATE, it compares the chat template with those of well-known models;
when none is near, it prompts without any template. Here the words around each message are found by rendering
conversations of marker words; no list of models is involved. The result is compared with the Jinja original over a
battery of conversations, and refused where it differs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_assets.chat.pinning import pins
from finetune_assets.chat.rendering import render_jinja
from finetune_assets.export.gguf.chat_metadata import adds_bos, special_tokens
from finetune_assets.export.ollama.template import go_eval
from finetune_assets.models.formats.gguf import read_head
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.reporting.first_difference import first_difference

Messages = list[dict[str, str]]

MARKERS = {"S": "qxSystemxq", "1": "qxUserOnexq", "2": "qxReplyOnexq", "3": "qxUserTwoxq", "4": "qxReplyTwoxq",
           "5": "qxUserThreexq"}  # fmt: skip
ROLES = {"S": "system", "1": "user", "2": "assistant", "3": "user", "4": "assistant", "5": "user"}
CONTENT, END = "{{ .Content }}", "{{ end }}"
HINT = (
    "llama-server --jinja follows the one in the GGUF file: `finetune artifacts` has the command. For Ollama, give the "
    "model a template that it can follow (model.template: chatml, say) and train again"
)


@dataclass(frozen=True)
class GoTemplate:
    """An Ollama TEMPLATE.

    Attributes:
        system: the system message to serve it with: the one asked for, but for white space around it that the chat
            template takes away; None where none was asked for, or the chat template writes none.
        notes: differences that remain.
    """

    text: str
    system: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Words:
    """What a chat template puts around messages.

    before_system / first_user / after_system: before a system message (None: the template writes none); before a user
    message that opens the conversation; between a system message and the user's. late: the system message stands in the
    last user message's turn. user, user_end, assistant, assistant_end: around the others. generation: after the last
    message, to ask for an answer.
    """

    before_system: str | None
    after_system: str
    late: bool
    first_user: str
    user: str
    user_end: str
    assistant: str
    assistant_end: str
    generation: str


def from_gguf(gguf: Path, system: str | None = None) -> GoTemplate:
    """Return the TEMPLATE for a GGUF file, from the chat template and the special tokens in its metadata.

    Args:
        system: the system message that it is to be served with.

    Raises:
        StepFailed: the file has no chat template, or no faithful TEMPLATE can be derived from it (with the reason).
    """
    head = read_head(gguf)
    template = head.get("tokenizer.chat_template")
    if not template:
        raise StepFailed(f"{gguf} holds no chat template", "make the merged model and the GGUF file again")
    return derive(template, special_tokens(head), add_bos=adds_bos(head), system=system)


def derive(template: str, specials: Mapping[str, str], *, add_bos: bool, system: str | None = None) -> GoTemplate:
    """Return the Go template that renders every ordinary conversation as the Jinja `template` does.

    Args:
        specials: bos_token, eos_token, ... as the tokenizer names them.
        add_bos: the server adds the begin-of-text token itself, so that the TEMPLATE must not.
        system: the system message that it is to be served with.

    Raises:
        StepFailed: there is none, with the reason.
    """
    from jinja2 import TemplateError

    bos = specials.get("bos_token", "") if add_bos else ""
    words = _words(template, specials)
    if add_bos and not words.first_user.startswith(bos):
        raise StepFailed(
            f"the server would put {bos} before every prompt, which the chat template does not",
            "make the GGUF file again: its tokenizer.ggml.add_bos_token has to be false",
        )
    text = _go(words, bos)

    def difference(messages: Messages, served: Messages) -> str | None:
        """Return how the prompt of `messages` differs from a server's prompt of `served`; None if equal."""
        try:
            wanted = render_jinja(template, messages, specials)
        except TemplateError as error:
            return f"it refuses it: {error}"
        return differs(bos + go_eval.render(text, go_data(served)), wanted)

    notes: list[str] = []
    for kind, messages in battery():
        read = messages if words.before_system is not None else [m for m in messages if m["role"] != "system"]
        if (found := difference(read, messages)) is None:
            continue
        if kind == "ordinary":
            raise StepFailed(f"no Ollama template renders this chat template: {found}", HINT)
        notes.append(f"{kind}: rendered differently")
    if words.before_system is None:
        notes.append("the chat template writes no system message, so there is no SYSTEM")
    if _tells_of_tools(template, specials):
        notes.append(
            "the chat template writes tools, TEMPLATE does not: Go spells their JSON otherwise than Jinja does. Ollama "
            "before 0.30 refuses requests with tools; later releases and llama-server --jinja follow the chat template"
        )
    if (told := pins(template)) or "strftime_now" in template:
        notes += told or ["the chat template prints today's date: TEMPLATE keeps to one"]
    if "<think>" in words.generation:
        ends = "with thinking closed" if "</think>" in words.generation else "in an open <think>"
        notes.append(f"a prompt ends {ends}, as it did in training")
    served = _served(system, difference) if system and words.before_system is not None else None
    return GoTemplate(text, served or None, tuple(dict.fromkeys(notes)))


def differs(got: str, wanted: str) -> str | None:
    """Return how the prompt that a server makes differs from what the chat template writes; None if it does not."""
    if got == wanted:
        return None
    at = first_difference(got, wanted)
    near = slice(max(0, at - 30), at + 30)
    return f"it writes {wanted[near]!r} where {got[near]!r} would be"


def _served(system: str, difference: Callable[[Messages, Messages], str | None]) -> str:
    """Return a system message as a server must have it to make the same prompts of it."""

    def talk(said: str, keys: str) -> Messages:
        turns = [{"role": ROLES[key], "content": MARKERS[key]} for key in keys]
        return [{"role": "system", "content": said}, *turns]

    found = None
    for served in (system, system.strip()):
        differences = [difference(talk(system, keys), talk(served, keys)) for keys in ("1", "123")]
        found = next(filter(None, differences), None)
        if found is None:
            return served
    raise StepFailed(
        f"no Ollama template renders this chat template with this system prompt: {found}",
        "take out of ollama.system (or model.default_system) what the chat template takes for a command",
    )


def _tells_of_tools(template: str, specials: Mapping[str, str]) -> bool:
    from jinja2 import TemplateError

    name, word = "qxToolxq", {"type": "string", "description": "a word"}
    parameters = {"type": "object", "properties": {"word": word}, "required": ["word"]}
    tool = {"type": "function", "function": {"name": name, "description": "to look up", "parameters": parameters}}
    try:
        return name in render_jinja(template, [{"role": "user", "content": "hello"}], specials, tools=[tool])
    except TemplateError:
        return False


def go_data(messages: Sequence[Mapping[str, str]]) -> dict[str, object]:
    """Return what an Ollama server hands to a TEMPLATE for these messages."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    said = [{"Role": message["role"], "Content": message["content"]} for message in messages]
    return {"System": system, "Messages": said}


def battery() -> Iterator[tuple[str, Messages]]:
    """Yield conversations to compare on: ("ordinary" or the name of an edge, messages)."""
    contents = [
        "Who are you?",
        "你是谁？你叫什么名字？",
        "She said \"no\" and 'yes'; C:\\new\\table",
        "{{ .Content }} {% if x %} }} {",
        "Two\n\nparagraphs\twith a tab\n- and <b>markup</b> & more",
        '$i @x #y `code` """three""" 🙂',
    ]
    for said in (None, "You are a helpful assistant.", '你是"助手"。\n{{ .System }}'):
        opening = [] if said is None else [{"role": "system", "content": said}]
        for at in range(len(contents)):
            for turns in (1, 3, 5):
                words = [contents[(at + n) % len(contents)] for n in range(turns)]
                roles = ["user", "assistant"] * 3
                talk = [{"role": role, "content": word} for role, word in zip(roles, words, strict=False)]
                yield "ordinary", [*opening, *talk]
    yield "an empty message", [{"role": "user", "content": ""}]
    yield "white space around a message", [{"role": "user", "content": " \n hello \n "}]
    yield "an empty system message", [{"role": "system", "content": ""}, {"role": "user", "content": "hello"}]
    for kind, answer in (("an empty answer", ""), ("thinking in an earlier answer", "<think>\nHm.\n</think>\n\nYes.")):
        roles = {"user": "hello", "assistant": answer}
        yield kind, [{"role": role, "content": word} for role, word in [*roles.items(), ("user", "and?")]]


def _words(template: str, specials: Mapping[str, str]) -> Words:
    from jinja2 import TemplateError

    def rendered(keys: str, generation: bool = True) -> str:
        messages = [{"role": ROLES[key], "content": MARKERS[key]} for key in keys]
        return render_jinja(template, messages, specials, generation=generation)

    def between(keys: str, generation: bool = True) -> list[str]:
        return _split(rendered(keys, generation), keys)

    try:
        ordinary = rendered("12345")
        first_user, answer, user, answer2, user2, end = _split(ordinary, "12345")
        user_end = between("1", generation=False)[-1]
        assistant_end = between("12", generation=False)[-1]
    except TemplateError as error:
        raise StepFailed(f"the chat template refuses an ordinary conversation: {error}", HINT) from error
    if (answer, user) != (answer2, user2):
        raise StepFailed("the chat template writes the same kind of turn in more than one way", HINT)
    # Some templates end a conversation that asks for no answer in another way; then the words stay in one piece.
    user_end = user_end if answer.startswith(user_end) and end.startswith(user_end) else ""
    assistant_end = assistant_end if user.startswith(assistant_end) else ""
    before_system, after_system, late = None, "", False
    try:
        told = rendered("S12345")
    except TemplateError:  # it knows no system message
        told = ordinary
    if told != ordinary:  # or leaves it out
        if late := told.find(MARKERS["4"]) < told.find(MARKERS["S"]):
            *rest, before_system, after_system, last = _split(told, "1234S5")
            same = [*rest, last] == [first_user, answer, user, answer2, end] and before_system.startswith(user)
            before_system = before_system.removeprefix(user)
        else:
            before_system, after_system, *rest = _split(told, "S12345")
            same = rest == [answer, user, answer2, user2, end]
        if not same:
            raise StepFailed("the chat template writes turns differently when there is a system message", HINT)
    return Words(
        before_system,
        after_system,
        late,
        first_user,
        user.removeprefix(assistant_end),
        user_end,
        answer.removeprefix(user_end),
        assistant_end,
        end.removeprefix(user_end),
    )


def _split(text: str, keys: str) -> list[str]:
    """Return the texts before, between and after the markers of these keys; each must appear once, in order."""
    parts: list[str] = []
    for marker in (MARKERS[key] for key in keys):
        before, found, text = text.partition(marker)
        if not found or marker in text:
            raise StepFailed("the chat template moves, repeats or leaves out messages", HINT)
        parts.append(before)
    return [*parts, text]


def _go(words: Words, bos: str) -> str:
    """Write the TEMPLATE that puts these words around messages."""
    user = [*_before_user(words, bos), CONTENT, _literal(words.user_end), *_if("$last", [_literal(words.generation)])]
    assistant = [_literal(words.assistant), CONTENT, *_if("not $last", [_literal(words.assistant_end)])]
    turns = {"user": user, "assistant": assistant}
    if words.before_system is not None and not words.late:
        # where the user's turn begins with the system message, it writes what comes after that
        after = words.after_system.removesuffix(words.user) if words.after_system.endswith(words.user) else ""
        turns = {"system": [_literal(words.before_system.removeprefix(bos)), CONTENT, _literal(after)], **turns}
    pieces = [_action("range $i, $_ := .Messages"), _action("$last := eq (len (slice $.Messages $i)) 1")]
    for number, (role, turn) in enumerate(turns.items()):
        pieces += [_action(f'{"else if" if number else "if"} eq .Role "{role}"'), *turn]
    return "".join([*pieces, END, END])


def _before_user(words: Words, bos: str) -> list[str]:
    """Write what comes before a user message: in the first turn, after a system message, and elsewhere."""
    in_front = words.before_system is not None and not words.late
    pieces = [_literal(words.user)]
    if in_front and not words.after_system.endswith(words.user):
        # the user's turn has begun with the system message (Gemma 3)
        begun = 'and (eq $i 1) (eq (index $.Messages 0).Role "system")'
        pieces = _if(begun, [_literal(words.after_system)], pieces)
    first = words.first_user.removeprefix(bos)
    opens = "eq $i 0" if in_front else "le $i 1"  # a system message that is not written where it stands comes before
    if first.endswith(words.user) and first != words.user:
        pieces = [*_if(opens, [_literal(first.removesuffix(words.user))]), *pieces]
    elif first != words.user:
        pieces = _if(opens, [_literal(first)], pieces)
    if words.late:
        system = [_literal(words.before_system or ""), _action("$.System"), _literal(words.after_system)]
        pieces = [*pieces, *_if("and $last $.System", system)]
    return pieces


def _if(condition: str, pieces: list[str], otherwise: list[str] | None = None) -> list[str]:
    alternative = [] if otherwise is None else [_action("else"), *otherwise]
    return [_action(f"if {condition}"), *pieces, *alternative, END]


def _action(text: str) -> str:
    return "{{ " + text + " }}"


def _literal(text: str) -> str:
    """Return text as it stands, or as a quoted string where Go would take its braces for an action."""
    if "{{" in text or text.endswith("{"):
        return _action(json.dumps(text, ensure_ascii=False))
    return text
