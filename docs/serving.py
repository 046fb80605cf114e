"""Printer of docs/serving.md: the model in the servers of other programs, with their output.

usage: python -m docs.serving RECIPE [> docs/serving.md]
Run the recipe first (`make demo`). Needs curl and Ollama (on the PATH, or OLLAMA_BIN); llama.cpp's server is run, too,
where `llama-server` is on the PATH. Works on a copy of the finished project; artifacts are linked, not copied.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.request import urlopen

from docs.changes import PROJECT, Copy
from finetune_assets.export.ollama.server.temporary import find_binary, free_port, serving
from finetune_assets.export.serving_commands import LLAMA_SERVER, OLLAMA
from finetune_assets.recipe.file import find_recipe, load_recipe
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import StepFailed

HEAD = """# The model, served

Printed by `python -m docs.serving {recipe}`. Each command was run on the finished project; its output stands below it.
The servers listened on free ports of the loopback interface, over a copy of the project; ports and paths are replaced
by the usual ones. Each program samples its answers as it does by default, so they differ from one run to the next;
`finetune chat` always takes the likeliest token.

Merge an adapter before you serve it: `ADAPTER` in a Modelfile never ran in Ollama's own engine, and servers since
0.34.1 refuse it. [Which Ollama does what](ollama.md) has the rest.
"""
INVENTORY = "## What can be served, and how\n"
ACCOUNT = "## Ollama\n\nThe server's own account of the model:\n"
CONVERSATION = "A conversation; each answer ends by itself:\n"
ENDPOINT = "The endpoint that is compatible with OpenAI's:\n"
VERIFIED = "The check that the server serves what was made: every byte, and an answer compared with llama.cpp's:\n"
COMPARED = "Base model and served model, side by side:\n"
LLAMA_CPP = "## llama.cpp's server\n"
VLLM = "## vLLM\n\nNot run here: it needs a GPU. Its command is above, with flags from vLLM's own documentation."
QUESTIONS = ("Who are you?", "你是谁？", "What is the capital of France?")
PROMPT = "Send a message (/? for help)"  # what `ollama run` shows where one types
CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\u2800-\u28ff] ?")  # movements and colours of a terminal; a spinner
WIDTH = 110


class Shell:
    """A runner of commands in a folder, which prints each with its output.

    Args:
        shown: what is printed in place of paths and addresses of this machine.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], shown: Mapping[str, str]):
        self.folder, self.environment, self.shown = folder, environment, shown

    def hear(self, command: str) -> str:
        """Return the output of a command."""
        done = subprocess.run(
            command, shell=True, env=self.environment, cwd=self.folder, capture_output=True, encoding="utf-8"
        )
        if done.returncode:
            sys.exit(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def run(self, *commands: str) -> None:
        for command in commands:
            self.show(command, self.hear(command))

    def show(self, command: str, said: str) -> None:
        with contextlib.suppress(ValueError):  # most of it is no JSON
            said = json.dumps(json.loads(said), indent=2, ensure_ascii=False)
        text = f"$ {command}\n{said.strip()}"
        for real, shown in self.shown.items():
            text = text.replace(real, shown)
        lines = "\n".join(line.rstrip() for line in text.splitlines())
        print(f"````console\n{lines}\n````\n", flush=True)

    def converse(self, command: str, words: tuple[str, ...]) -> None:
        """Type words into `ollama run` on a terminal of its own, and print the conversation."""
        child, terminal = pty.fork()
        if child == 0:
            os.execvpe("/bin/sh", ["sh", "-c", command], dict(self.environment))
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, WIDTH, 0, 0))
        _read(terminal)
        talk = []
        for line in (*words, "/bye"):
            os.write(terminal, line.encode() + b"\r")
            _, _, answer = CONTROLS.sub("", _read(terminal)).replace("\r\n", "\n").partition("\n")  # the echo goes
            talk.append(f">>> {line}\n{answer.rpartition('>>> ')[0].replace(chr(13), '').strip()}")
        os.waitpid(child, 0)
        os.close(terminal)
        self.show(command, "\n".join(talk))


def _read(terminal: int) -> str:
    """Read until the program waits for input, or ends."""
    read = b""
    while PROMPT.encode() not in read:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # Linux says so when the other side is closed
            break
        read += piece
        if not piece:
            break
    return read.decode(errors="replace")


@contextlib.contextmanager
def llama_server(command: str, shell: Shell) -> Iterator[str]:
    """Run llama.cpp's server by this command, on a free port; yields its address."""
    address = f"http://127.0.0.1:{free_port()}"
    port, usual = address.rpartition(":")[2], LLAMA_SERVER.rpartition(":")[2]
    words = shlex.split(command.replace(f"--port {usual}", f"--port {port}"))
    with subprocess.Popen(words, env=shell.environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) as server:
        try:
            while server.poll() is None:
                try:
                    urlopen(f"{address}/health", timeout=5).close()
                    break
                except OSError:  # not there yet, or still loading
                    time.sleep(0.2)
            yield address
        finally:
            server.terminate()


def main(recipe: str) -> None:
    binary = find_binary()
    if binary is None or binary.name != "ollama":
        raise StepFailed("there is no Ollama here", "install it, or set OLLAMA_BIN to a program of the name `ollama`")
    name = load_recipe(find_recipe(recipe, PROJECT / "configs")).ollama.name
    with tempfile.TemporaryDirectory(dir=PROJECT / "dagster_home") as folder:
        copy = Copy(Path(folder) / "copy", recipe)
        models = Project(copy.root, copy.home).ollama_models
        with serving(models, binary=binary) as host:
            path = [str(binary.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
            environment = {
                **os.environ,
                **{"FINETUNE_PROJECT": str(copy.root), "DAGSTER_HOME": str(copy.home), "PATH": os.pathsep.join(path)},
                **{"OLLAMA_HOST": host, "HOME": folder, "COLUMNS": str(WIDTH), "TERM": "xterm"},
            }
            real = os.environ.get("DAGSTER_HOME") or str(PROJECT / "dagster_home")
            shown = {str(copy.home): "dagster_home", real: "dagster_home", host: OLLAMA}
            show_all(Shell(copy.root, environment, shown), recipe, name, host)


def show_all(shell: Shell, recipe: str, name: str, host: str) -> None:
    print(HEAD.format(recipe=recipe))
    print(INVENTORY)
    shell.run(f"finetune artifacts {recipe}")
    print(ACCOUNT)
    shell.run("ollama --version", "ollama list", f"ollama show {name}")
    shell.run(*(f"ollama show {name} --{part}" for part in ("modelfile", "template", "parameters", "system")))
    print(CONVERSATION)
    shell.converse(f"ollama run {name}", QUESTIONS)
    print(ENDPOINT)
    lines = [line.strip() for line in shell.hear(f"finetune artifacts {recipe}").splitlines() if line[:1] == " "]
    shell.run(*(line.replace(OLLAMA, host) for line in lines if line.startswith(f"curl {OLLAMA}")))
    print(VERIFIED)
    shell.run(f"finetune verify {recipe}")
    print(COMPARED)
    for question in QUESTIONS[:2]:
        shell.run(f"finetune chat {recipe} --with base,ollama --max-new-tokens 64 -m {shlex.quote(question)}")
    print(LLAMA_CPP)
    serve = next(line for line in lines if line.startswith("llama-server "))
    if shutil.which("llama-server"):
        with llama_server(serve, shell) as address:
            shell.show(f"{serve} &", "")
            shell.shown = {**shell.shown, address: LLAMA_SERVER}
            shell.run(
                *(line.replace(LLAMA_SERVER, address) for line in lines if line.startswith(f"curl {LLAMA_SERVER}"))
            )
    else:
        print("There was no `llama-server` on the PATH.\n")
    print(VLLM)


if __name__ == "__main__":
    main(sys.argv[1])
