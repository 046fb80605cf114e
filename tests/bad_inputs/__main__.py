"""Try bad inputs and print how they were answered."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.bad_inputs.attempt import attempt, warm
from tests.bad_inputs.families import cases, sample


def main() -> int:
    warm()
    share = next((int(word[2:]) for word in sys.argv[1:] if word.startswith("1/")), 1)
    chosen = sample(cases([word for word in sys.argv[1:] if not word.startswith("1/")]), share)
    count: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    worst: dict[str, tuple[float, int]] = {}
    for number, case in enumerate(chosen):
        with tempfile.TemporaryDirectory(prefix="bad-input-") as scratch:
            answer = attempt(case, Path(scratch))
        count[case.family] += 1
        seconds, memory = worst.get(case.family, (0.0, 0))
        worst[case.family] = max(seconds, answer.seconds), max(memory, answer.memory)
        if (fault := answer.fault(case)) is not None:
            faults[case.family] += 1
            print(f"\n[{number}] {case.family}: {case.title}: {fault}\n    {answer.text.strip()[-600:]!r}", flush=True)
    print("\n| family | inputs | faults | slowest (s) | largest (MB) |\n|---|---|---|---|---|")
    for family, inputs in count.items():
        seconds, memory = worst[family]
        print(f"| {family} | {inputs} | {faults[family]} | {seconds:.1f} | {memory / 1e6:.0f} |")
    print(f"| all | {count.total()} | {faults.total()} | | |")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
