"""Which template a server renders prompts with: its rule, row by row."""

from __future__ import annotations

import re

import pytest

from finetune_assets.export.ollama.template.choice import (
    go_capabilities,
    go_round_trip,
    jinja_capabilities,
    jinja_round_trip,
    served_by,
)
from finetune_assets.export.ollama.template.go_parse import Branch, Text, parse

pytestmark = pytest.mark.fast

PLAIN = "{{ range .Messages }}{{ .Role }}: {{ .Content }}\n{{ end }}"
TOOLS = "{{ .Tools }}" + PLAIN
ROUND = (
    "{{ .Tools }}{{ range .Messages }}{{ if eq .Role \"tool\" }}{{ .Content }}{{ end }}"
    "{{ range .ToolCalls }}{{ .Function.Name }}{{ end }}{{ end }}"
)  # fmt: skip
INSERT = PLAIN + "{{ .Suffix }}"
THINKS = "{{ range .Messages }}{{ if .Thinking }}<think>{{ .Thinking }}</think>{{ end }}{{ .Content }}{{ end }}"

J_PLAIN = "{{ messages[0].content }}"
J_TOOLS = "{{ tools }}{{ messages[0].content }}"
J_ROUND = J_TOOLS + "{{ message.tool_calls }}{{ message.role == 'tool' }}"
J_THINKS = J_PLAIN + "<think></think>"
J_BOTH = J_ROUND + "<think></think>"


@pytest.mark.parametrize(
    ("go", "jinja", "path", "reason"),
    [
        # 1. more capabilities, and TEMPLATE has no round trip or Jinja has one
        (PLAIN, J_TOOLS, "jinja", r"can do more than TEMPLATE \(tools\)"),
        (PLAIN, J_THINKS, "jinja", r"can do more than TEMPLATE \(thinking\)"),
        (PLAIN, J_BOTH, "jinja", r"\(thinking and tools\)"),
        (TOOLS, J_TOOLS + "<think></think>", "jinja", r"\(thinking\)"),
        (ROUND, J_BOTH, "jinja", r"\(thinking\)"),
        (ROUND, J_TOOLS + "<think></think>", "template", "TEMPLATE writes tool calls and their results"),
        (INSERT, J_BOTH, "jinja", "can do more"),
        # 2. the same ones, tools among them, and a round trip in Jinja alone
        (TOOLS, J_ROUND, "jinja", "the chat template writes tool calls and their results"),
        (ROUND, J_ROUND, "template", "all that the chat template can"),
        (TOOLS, J_TOOLS, "template", "all that"),
        (ROUND, J_TOOLS, "template", "all that"),
        (INSERT, J_TOOLS, "template", "all that"),  # as many, but others
        (THINKS, J_TOOLS, "template", "all that"),
        (THINKS, J_THINKS, "template", "all that"),
        (PLAIN, J_PLAIN, "template", "all that"),
        (ROUND, J_PLAIN, "template", "all that"),
        # one of the two is missing
        (None, J_PLAIN, "jinja", "no TEMPLATE"),
        (PLAIN, None, "template", "no chat template"),
    ],
)
def test_the_rule(go: str | None, jinja: str | None, path: str, reason: str) -> None:
    choice = served_by("0.33.0", go, jinja, "llama")
    assert choice.path == path
    assert re.search(reason, choice.reason)
    assert served_by(None, go, jinja, "llama") == choice


@pytest.mark.parametrize(
    ("version", "path"),
    [("0.9.3", "template"), ("0.29.9", "template"), ("0.30.0-rc1", "jinja"), ("v0.30.0", "jinja"), ("1.0", "jinja"),
     ("0.0.0", "jinja"), ("main", "jinja")],
)  # fmt: skip
def test_versions(version: str, path: str) -> None:
    assert served_by(version, PLAIN, J_BOTH, "llama").path == path


@pytest.mark.parametrize(("setting", "path"), [("1", "template"), ("0", "jinja"), (None, "jinja")])
def test_the_setting_of_a_server(setting: str | None, path: str) -> None:
    assert setting in ("0", "1", None)
    assert served_by("0.33.0", PLAIN, J_BOTH, "llama", setting).path == path
    assert served_by("0.33.0", ROUND, J_PLAIN, "llama", setting).path == ("jinja" if setting == "0" else "template")
    assert served_by("0.9.3", PLAIN, J_BOTH, "llama", setting).path == "template"
    # nothing to choose from
    assert served_by("0.33.0", None, J_PLAIN, "llama", setting).path == "jinja"
    assert served_by("0.33.0", PLAIN, None, "llama", setting).path == "template"


@pytest.mark.parametrize("architecture", ["gemma4", "laguna", "nemotron_h", "nemotron_h_moe", "gpt-oss", "gptoss"])
def test_models_that_the_server_renders_itself(architecture: str) -> None:
    harmony = PLAIN + "<|start|><|end|>"
    choice = served_by("0.33.0", harmony, J_BOTH, architecture, "1")
    assert choice.path == "server" and architecture in choice.reason
    assert served_by("0.9.3", harmony, J_BOTH, architecture).path == "template"
    other = served_by("0.33.0", PLAIN, J_BOTH, architecture).path
    assert other == ("jinja" if architecture.startswith("gpt") else "server")


@pytest.mark.parametrize(
    ("jinja", "found"),
    [
        ("", ""), ("{{ tools }}", "tools"), ("{{ message.tool_call_id }}", "tools"), ("tool", ""),
        ("<think>", ""), ("</think>", ""), ("<think></think>", "thinking"),
        ("content.split('</think>')", "thinking"), ('content.split("</think>")', "thinking"),
        ("content.split('</think>') reasoning_content", ""), ("content.split('</think>') <SPECIAL_12>", ""),
        ("content.split('</think>') reasoning_content <think>", "thinking"),
        ("<think></think> tools", "thinking tools"),
    ],
)  # fmt: skip
def test_capabilities_of_a_chat_template(jinja: str, found: str) -> None:
    assert " ".join(sorted(jinja_capabilities(jinja))) == found


@pytest.mark.parametrize(
    ("jinja", "found"),
    [
        ("tool_calls", False), ("tools tool_response", False), ("tool_calls tool_response", True),
        ("assistant_tool_call tool_results", True), ("tool_calls ipython", True),
        *[(f"tool_calls message[{a}role{a}] == {b}tool{b}", True) for a in "'\"" for b in "'\""],
        *[(f"tool_calls message.role == {b}tool{b}", True) for b in "'\""], ("tool_calls m.role == 'tool'", False),
    ],
)  # fmt: skip
def test_round_trips_of_a_chat_template(jinja: str, found: bool) -> None:
    assert jinja_round_trip(jinja) is found


@pytest.mark.parametrize(
    ("go", "found"),
    [
        (PLAIN, ""), (TOOLS, "tools"), (INSERT, "insert"), (THINKS, "thinking"),
        ("{{ if $.Tools }}x{{ end }}", "tools"), ("{{ range $t := .Tools }}{{ $t }}{{ end }}", "tools"),
        ("{{ json .Tools }}", "tools"), ("{{ .Tools | json }}", "tools"), ("{{ (.Tools) }}", "tools"),
        ("{{ if and .System (len .tools) }}x{{ end }}", "tools"), ("{{ $Tools := 1 }}.Tools", ""),
        ("{{/* .Tools */}}", ""), ('{{ ".Tools" }}', ""), ("{{ (index .Messages 0).Tools }}", ""),
        ("{{ if .A }}{{ else if .B }}{{ with .C }}{{ .Suffix }}{{ end }}{{ end }}", "insert"),
        # thinking: in a range over .Messages, in a list that begins and ends with text
        ("{{ range .Messages }}<t>{{ .Thinking }}{{ end }}", ""),
        ("{{ range .Messages }}{{ .Thinking }}</t>{{ end }}", ""),
        ("{{ range .Messages }}<t>{{ .Thinking }}</t>{{ end }}", "thinking"),
        ("{{ range .Messages }} {{ .Thinking }}</t>{{ end }}", ""),
        ("{{ range $i, $_ := $.Messages }}<t>{{ .Thinking }}</t>{{ end }}", ""),
        ("{{ range $m := .Messages }}<t>{{ $m.Thinking }}</t>{{ end }}", ""),
        ("{{ range .Messages }}{{ range .ToolCalls }}<t>{{ .Thinking }}</t>{{ end }}{{ end }}", ""),
        ("{{ range .Messages }}<t>{{ if .Thinking }}{{ .Thinking }}{{ end }}</t>{{ end }}", "thinking"),
        ("<t>{{ .Thinking }}</t>", ""),
    ],
)  # fmt: skip
def test_capabilities_of_a_template(go: str, found: str) -> None:
    assert " ".join(sorted(go_capabilities(go))) == found


@pytest.mark.parametrize(
    ("go", "found"),
    [
        (ROUND, True), (TOOLS, False), (ROUND.replace("{{ .Tools }}", ""), False),
        (ROUND.replace('eq .Role "tool"', "true"), False),
        (ROUND.replace('eq .Role "tool"', "true") + "<tool_response>", True),
        (ROUND.replace('eq .Role "tool"', "true") + "[TOOL_RESULTS]", True),
        (ROUND.replace(".ToolCalls", ".Calls"), False),
    ],
)  # fmt: skip
def test_round_trips_of_a_template(go: str, found: bool) -> None:
    assert go_round_trip(go) is found


def test_trim_markers_and_quotes() -> None:
    first, loop, last = parse("a \n{{- range .M -}}\n {{ `}}` }} b\n{{- end -}} \n c")
    assert (first, last) == (Text("a"), Text("c"))
    assert isinstance(loop, Branch) and loop.then[1] == Text(" b")
    assert parse("a {{- /* }} */ -}} b") == (Text("a"), Text("b"))


@pytest.mark.parametrize(
    "go",
    ["{{ end }}", "{{ if .A }}", "{{ .A", '{{ "a }}', "{{ if .A }}{{ else }}{{ else }}{{ end }}", "{{ (.A }}", "{{ }}",
     "{{ .A | }}", "{{ range .A }}{{ else if .B }}{{ end }}", "{{ ? }}", "{{ $a, $b, $c := .A }}", "{{ if }}{{ end }}"],
)  # fmt: skip
def test_a_template_that_no_server_takes(go: str) -> None:
    with pytest.raises(ValueError):
        served_by("0.33.0", go, J_BOTH, "llama")
