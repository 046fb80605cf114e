"""A benchmark of `finetune plan` and `finetune run` with nothing to do, and of loading and planning many recipes.

usage: python bench/plan.py [--rounds N] [--recipes N]

Plan, store, data and Dagster are real; stand-ins that write small files replace training, merging and conversion. So
the figures describe the tool, not models: a plan does not read weights, only whether their files have changed. Each
measurement except the last has its own process. The script measures in turn, N rounds, and prints medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # for the tests' projects

CLI = "import sys; from finetune_assets.cli import main; sys.argv[1:] = {words}; main()"
# as a code server loads a code location
SERVE = "import finetune_assets.definitions as d; d.defs.get_repository_def().get_all_jobs()"
LOADED = "; import sys; sys.stderr.write(' '.join(name for name in ('torch', 'dagster') if name in sys.modules))"


def python(code: str, environment: Mapping[str, str]) -> str:
    """Run a piece of Python in a fresh process; return what it wrote to standard error."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return done.stderr


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(title: str, works: Mapping[str, Callable[[], object]], rounds: int) -> None:
    """Measure all works in turn, `rounds` times, and print the medians."""
    figures: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            figures[name].append(seconds(work))
    print(f"\n{title}")
    for name, measured in figures.items():
        print(f"  {name:<44}{statistics.median(measured):8.2f} s")


def imported(words: Sequence[str], environment: Mapping[str, str]) -> str:
    """Return the names of the heavy packages that a command imports."""
    code = f"import atexit; atexit.register(lambda: exec({LOADED[2:]!r})); {CLI.format(words=list(words))}"
    return python(code, environment) or "neither"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipes", type=int, default=50)
    options = parser.parse_args()

    from finetune_assets.lineage.plan import make_plan, open_store
    from finetune_assets.recipe.file import load_recipe
    from tests.conftest import make_mini
    from tests.support.history_fixtures import make_chain

    with tempfile.TemporaryDirectory() as folder:
        project = make_mini(Path(folder))
        text = project.recipe_path().read_text()
        environment = {"FINETUNE_PROJECT": str(project.root), "DAGSTER_HOME": str(project.home)}
        run = partial(python, environment=environment)
        make_chain(project)
        # `run` has no scores to print, as the steps are stand-ins: so it prints JSON
        commands = {"plan": ["plan", "mini"], "run": ["run", "mini", "--json"]}
        compare(
            "one recipe, nothing to do",
            {
                "python -c pass": partial(run, "pass"),
                "python -c 'import dagster'": partial(run, "import dagster"),
                **{f"finetune {name}": partial(run, CLI.format(words=words)) for name, words in commands.items()},
            },
            options.rounds,
        )
        for name, words in commands.items():
            print(f"  torch or dagster imported by finetune {name}: {imported(words, environment)}")

        names = [f"recipe_{number}" for number in range(options.recipes)]
        project.recipe_path().unlink()
        for name in names:
            project.recipe_path(name).write_text(text.replace("name: mini", f"name: {name}"))
            make_chain(project, name)

        def plan_all() -> None:
            store = open_store(project)
            for name in names:
                plan = make_plan(load_recipe(project.recipe_path(name)), project, store)
                assert {item.state for item in plan.values()} == {"fresh"}

        compare(
            f"{options.recipes} recipes, {options.recipes * 8} assets",
            {
                "python -c 'import dagster'": partial(run, "import dagster"),
                "definitions": partial(run, "import finetune_assets.definitions"),
                "definitions, resolved as by a code server": partial(run, SERVE),
                "plans, all fresh, in one process": plan_all,
            },
            options.rounds,
        )


if __name__ == "__main__":
    main()
