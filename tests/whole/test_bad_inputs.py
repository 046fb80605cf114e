"""Every bad input ends by itself, soon, in bounded memory, with one message that says what is wrong and where.

A sample here; `python -m tests.bad_inputs` tries all of them (about 20 minutes on two cores).
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from tests.bad_inputs.case import MEMORY, SECONDS, Answer, Case
from tests.bad_inputs.families import FAMILIES, cases
from tests.conftest import REPOSITORY

SHARE = 20  # one in so many is tried


def test_a_sample_of_all_families() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bad_inputs", f"1/{SHARE}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_there_are_enough_of_them() -> None:
    assert len(cases([])) > 1500
    assert all(len(cases([family])) > 10 for family in FAMILIES)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"code": None}, "did not end"),
        ({"seconds": SECONDS + 1}, "did not end"),
        ({"code": 0}, "exit code 0"),
        ({"code": -9}, "exit code -9"),
        ({"memory": MEMORY + 1}, "took"),
        ({"text": "x.yaml\nTraceback (most recent call last):"}, "nobody foresaw"),
        ({"text": "unexpected KeyError: 'x.yaml'"}, "nobody foresaw"),
        ({"text": "something is wrong"}, "names none of x.yaml"),
    ],
)
def test_what_counts_as_a_fault(changes: dict[str, Any], fault: str | None) -> None:
    good = Answer(2, "x.yaml:3: train.lora_rank: must be a number", 0.1, 10_000_000)
    found = dataclasses.replace(good, **changes).fault(Case("", "", ("x.yaml",)))
    assert (found is None) if fault is None else (found is not None and fault in found)
