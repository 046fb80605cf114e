"""Arguments and environment variables."""

from __future__ import annotations

from collections.abc import Iterator

from tests.bad_inputs.case import Case
from tests.bad_inputs.changes import base_folder


def command_lines() -> Iterator[Case]:
    """Arguments."""
    words = ("nobody", "", " ", ".", "..", "/", "min", "MINI", "mini.yml", "mini/", "configs", "configs/", "a\x1bb",
            "x" * 5000, "客服", "--", "-x", "\udcff", "mini\n", "*", "configs/nobody.yaml")  # fmt: skip
    for command in ("run", "plan", "artifacts", "verify", "rollback", "chat"):
        for word in words:
            yield Case(
                "command line",
                f"{command} {word[:20]!r}",
                ("recipe", "option", "RECIPE", "Usage"),
                command=(command, word),
            )
    for word in ("", "mini", "/", "mini/", "/lora_adapter", "mini/lora", "a/b/c", "nobody/lora_adapter",
            "mini/lora_adapter", "../x/lora_adapter", "x" * 3000 + "/lora_adapter"):  # fmt: skip
        yield Case("command line", f"explain {word[:30]!r}", ("ASSET", "made", "recipe"), command=("explain", word))
    for options in (("--to", "nobody"), ("--to", ""), ("--to",), ("--nobody",), ("--to", "gguf"), ("extra",)):
        yield Case(
            "command line",
            f"run mini {' '.join(options)}",
            ("--to", "--nobody", "extra", "Usage"),
            command=("run", "mini", *options),
        )
    for options in (("--keep", "-1"), ("--keep", "x"), ("nobody",), ("--keep", "1.5"), ("../x",), ("/",)):
        yield Case(
            "command line", f"gc {' '.join(options)}", ("--keep", "recipe", "nobody", "Usage"), command=("gc", *options)
        )
    for options in (("--to", ""), ("--to", "zz"), ("--to", "../x"), ("--to",)):
        yield Case(
            "command line",
            f"rollback mini {' '.join(options)}",
            ("made", "--to", "Usage"),
            command=("rollback", "mini", *options),
        )
    for options in (("--with", ""), ("--with", "x"), ("--with", "base,base,x"), ("--max-new-tokens", "0"),
            ("--max-new-tokens", "x"), ("--with", "gguf"), ("--with", "adapter"),
                    ("--with", "merged"), ("--with", "ollama")):  # fmt: skip
        yield Case(
            "command line",
            f"chat mini {' '.join(options)}",
            ("stage", "made", "--max-new-tokens", "with", "ollama"),
            command=("chat", "mini", "-m", "x", *options),
        )


def surroundings() -> Iterator[Case]:
    """Environment variables, and a DAGSTER_HOME that is none."""
    for value in ("/nowhere", "/dev/null", "nowhere", "/", "a\x1bb", "x" * 5000, "/etc/passwd"):
        yield Case(
            "surroundings", f"FINETUNE_PROJECT={value[:20]!r}", ("project",), environment={"FINETUNE_PROJECT": value}
        )
        yield Case(
            "surroundings",
            f"LLAMA_CPP_DIR={value[:20]!r}",
            ("LLAMA_CPP_DIR",),
            base_folder,
            ("run", "mini"),
            {"LLAMA_CPP_DIR": value},
        )
    for value in ("/dev/null", "/dev/null/x", "/proc/x", "x\n" * 200, "x" * 5000, "/etc/passwd"):
        yield Case(
            "surroundings",
            f"DAGSTER_HOME={value[:20]!r}",
            ("DAGSTER_HOME", value[:40], "passwd"),
            command=("run", "mini", "--to", "raw_dataset"),
            environment={"DAGSTER_HOME": value},
        )
