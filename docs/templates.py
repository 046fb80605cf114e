"""Printer of docs/templates.md: how Ollama servers of each release render published chat templates.

usage: python -m docs.templates LLAMA_CPP_TEMPLATES [> docs/templates.md]
LLAMA_CPP_TEMPLATES: the folder models/templates of llama.cpp's sources (the source archive of llama-cpp-python has it
under vendor/llama.cpp). Needs an Ollama 0.9 program (PATH, OLLAMA_BIN), which counts the tokens of prompts.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune_assets.chat.pinning import pinned, pins
from finetune_assets.chat.rendering import render_jinja
from finetune_assets.export.ollama.server.api import answers
from finetune_assets.export.ollama.server.temporary import serving
from finetune_assets.export.ollama.template.choice import served_by
from finetune_assets.export.ollama.template.derive import battery
from finetune_assets.export.ollama.template.proof import CALLS, ORDINARY, TOOLS, Proof, prove_file
from finetune_assets.reporting.errors import StepFailed
from tests.support.ollama.template_files import SPECIALS, letters_file, published

HEAD = """# Published chat templates, and the two ways in which Ollama makes prompts

Printed by `python -m docs.templates`: the chat templates that TRL ships and llama.cpp tests with. Each is compared in
both ways with training's own rendering (transformers), over {talks} ordinary conversations and the edge cases.

- *TEMPLATE*: the derived Go template, in our evaluator over all conversations, and on a real Ollama {release}. There a
  model of bytes counts the tokens of the prompt (`prompt_eval_count`), which must be as many as its bytes.
- *Jinja*: the GGUF file's chat template in llama.cpp's engine, the one inside current servers, with their requests.
- *0.9*, *current*: what a server of that release renders prompts with (`export.ollama.template.choice.served_by`).
- *tools*: whether a current server writes tools, calls and results as transformers does, in the order in which Ollama
  passes their keys on. TEMPLATEs have no tools: Go writes JSON without spaces and with sorted keys, unlike what the
  model learnt. Servers would prefer a TEMPLATE that names tools to the chat template, which writes them correctly. So
  Ollama serves tools since 0.30; earlier releases refuse a request with tools ("does not support tools").
- *pinned*: what is written in front of the chat template before training, because engines answer it differently
  (`chat.pinning`): llama.cpp passes `enable_thinking` and today's date to a template, transformers does not.

*equal* means every ordinary conversation. An edge case that differs is in brackets, and in the notes of ollama_model. A
*refused* template is refused before training, for the reason given. Architectures with a renderer inside the server
(gemma4, laguna, nemotron_h, gpt-oss) are rendered by it on current servers, whatever this table says; ollama_model
reports that.
"""
COLUMNS = ("chat template", "TEMPLATE", "Jinja", "0.9", "current", "tools", "pinned")
CONTEXT = 32768  # bytes of a prompt, on the real server


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    template: str
    jinja: str
    before: str = "-"
    current: str = "-"
    tools: str = "-"
    pinned: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        return (self.name, self.template, self.jinja, self.before, self.current, self.tools, self.pinned)

    def __str__(self) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in self.cells) + " |"


def row_of(name: str, published_text: str, folder: Path) -> tuple[Row, Proof | None]:
    """Prove one template; the real server is not asked here."""
    template = pinned(published_text)
    try:
        proof = prove_file(letters_file(folder / "letters.gguf", template))
    except StepFailed as refused:
        why = f"refused: {refused.message}"
        return Row(name, why, why), None
    if proof.problem is not None:
        return Row(name, "equal", f"refused: {proof.problem}"), None
    edges = [note.partition(":")[0] for note in proof.template.notes if note.endswith(": rendered differently")]
    others = [kind for kind in proof.jinja if kind not in (TOOLS, CALLS)]
    wrong = [kind for kind in (TOOLS, CALLS) if kind in proof.jinja]
    tools = ("differ: " + ", ".join(wrong)) if wrong else "equal"
    row = Row(
        name,
        _equal(edges),
        _equal(others) if ORDINARY not in others else "differs",
        served_by("0.9.3", proof.template.text, template, "llama").path,
        proof.current.path,
        tools if _says(proof, "writes tools") else "none",
        ", ".join("thinking off" if text.startswith("thinking") else "date" for text in pins(template)),
    )
    return row, proof


def totals(rows: list[Row]) -> str:
    """Return the line under the table."""
    good = sum(row.template.startswith("equal") for row in rows)
    jinja = sum(row.jinja.startswith("equal") for row in rows)
    refused = sum("refused" in row.template + row.jinja for row in rows)
    current = {path: sum(row.current == path for row in rows) for path in ("template", "jinja")}
    tools = sum(row.tools == "equal" for row in rows)
    return (
        f"{len(rows)} templates x 2 ways: {good} equal as TEMPLATE, {jinja} equal as Jinja, {refused} refused before "
        f"training. A current server takes TEMPLATE for {current['template']} of them and Jinja for "
        f"{current['jinja']}; tools are equal for {tools} of the {sum(row.tools not in ('none', '-') for row in rows)} "
        "that write them."
    )


def _equal(edges: list[str]) -> str:
    return f"equal ({', '.join(edges)})" if edges else "equal"


def serve_bytes(client: Any, folder: Path) -> None:
    """Put the model of bytes on a real server."""
    file = letters_file(folder / "bytes.gguf", "{{ messages }}", context=CONTEXT)
    options = {"num_ctx": CONTEXT, "num_batch": CONTEXT, "num_thread": 1}
    client.create(model="bytes", files={"bytes.gguf": client.create_blob(file)}, parameters=options)


def counted(client: Any, template: str, proof: Proof) -> str | None:
    """Return the first conversation for which a real server counts other bytes than training's prompt has."""
    client.create(model="letters", from_="bytes", template=proof.template.text)
    for talk in ordinary():
        told = (
            [message for message in talk if message["role"] != "system"] if _says(proof, "no system message") else talk
        )
        wanted = len(_bytes(render_jinja(template, told, SPECIALS)))
        answer = client.chat(model="letters", messages=talk, options={"num_predict": 1})
        if answer.prompt_eval_count != wanted:
            return f"differs on the server: {answer.prompt_eval_count} tokens instead of {wanted}"
    return None


def ordinary() -> list[list[dict[str, str]]]:
    """Return the ordinary conversations of the battery."""
    return [talk for kind, talk in battery() if kind == ORDINARY]


def _says(proof: Proof, words: str) -> bool:
    return any(words in note for note in proof.template.notes)


def _bytes(prompt: str) -> list[int]:
    """Return the tokens of a prompt: <s> and </s>, else bytes."""
    for number, text in enumerate(SPECIALS.values()):
        prompt = prompt.replace(text, chr(number))
    return [*prompt.encode()]


def main(folder: Path) -> None:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary, serving(Path(temporary) / "models") as host:
        import ollama

        client = ollama.Client(host=host, timeout=300, trust_env=False)
        serve_bytes(client, Path(temporary))
        print(HEAD.format(talks=len(ordinary()), release=answers(host)))
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        for name, text in published(folder).items():
            row, proof = row_of(name, text, Path(temporary))
            if proof is not None and (wrong := counted(client, pinned(text), proof)):
                row = replace(row, template=wrong)
            rows.append(row)
            print(row, flush=True)
    print(f"\n{totals(rows)}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
