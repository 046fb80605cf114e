"""The command line: `finetune run | plan | artifacts | explain | chat | verify | rollback | gc | doctor | schema`.

Exit codes: 0 done or up to date, 1 a step failed, 2 bad input.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import Annotated, Any

import typer
from rich.text import Text

from finetune_assets.cli import tables
from finetune_assets.cli.console import SafeConsole
from finetune_assets.lineage.graph import NODES, upstream_of
from finetune_assets.lineage.plan import make_plan, open_store
from finetune_assets.recipe import Recipe, did_you_mean
from finetune_assets.recipe.file import find_recipe, json_schema, load_recipe, readable_recipes, refuse_rivals
from finetune_assets.recipe.project import Project
from finetune_assets.reporting.errors import BadInput, FinetuneError
from finetune_assets.reporting.events import Event, Message
from finetune_assets.reporting.masking import mask_logging, masked
from finetune_assets.reporting.printable import printable_json

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="From instruction data to a model served by Ollama.",
)
out = SafeConsole()
err = SafeConsole(stderr=True)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A name in configs/, or a path.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (allowed anywhere on the line).")] = False,
) -> None:
    """From instruction data to a model served by Ollama."""


@app.command()
def run(
    recipe: RecipeArgument,
    to: Annotated[
        list[str] | None, typer.Option("--to", metavar="ASSET", help="Build up to this asset only (repeatable).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also rebuild assets that are up to date.")] = False,
    as_json: Json = False,
) -> None:
    """Bring a recipe's assets up to date, through Dagster."""
    from finetune_assets.cli.live import LiveRun
    from finetune_assets.cli.results import headline, print_results
    from finetune_assets.lineage.prerequisites import check_prerequisites

    project, loaded = _load(recipe)
    targets = _assets(to or [])
    store = open_store(project)
    plan = make_plan(loaded, project, store)
    requested = upstream_of(set(targets)) if targets else set(NODES)
    forced = set(targets or NODES) if force else set()
    todo = [name for name in NODES if name in forced or (name in requested and plan[name].state != "fresh")]
    for name in requested - set(todo):
        if (artifact := plan[name].artifact) is not None:
            # the recipe may be back at earlier values: nothing runs, but their artifact becomes the current one
            store.make_current(artifact)
    if "ollama_model" in todo:
        refuse_rivals(loaded, readable_recipes(project.configs))
    check_prerequisites(loaded, project, store, todo, forced=forced)
    started = time.monotonic()
    run_id, reused = None, []
    if todo:
        from finetune_assets.assets.automation.run import run_chain

        try:
            with LiveRun([name for name in NODES if name in requested], todo) as live:
                run_id = run_chain(loaded, project, todo, live.event, force=force)
                reused = live.reused
        except KeyboardInterrupt:
            err.print("interrupted; published artifacts are kept, unfinished ones were removed")
            raise typer.Exit(130) from None
        plan = make_plan(loaded, project, store)
    seconds = time.monotonic() - started
    artifacts = tables.known_artifacts(loaded, plan, store)
    if as_json:
        _print_json(
            {
                "recipe": loaded.name,
                "ran": todo,
                "reused": reused,
                "run_id": run_id,
                "seconds": round(seconds, 1),
                "artifacts": tables.artifacts_json(artifacts),
            }
        )
        return
    out.print(Text(f"{loaded.name}: {headline(len(todo) - len(reused), len(reused), seconds)}", style="bold"))
    print_results(out, loaded, artifacts, project.ollama_models)


@app.command()
def plan(recipe: RecipeArgument, as_json: Json = False) -> None:
    """List what would run, the reasons, and the expected time and disk space."""
    from finetune_assets.lineage.estimate import costs, total
    from finetune_assets.machine.disk import free_bytes

    project, loaded = _load(recipe)
    store = open_store(project)
    planned = make_plan(loaded, project, store)
    expected = costs(loaded, project, planned, store)
    if as_json:
        _print_json(tables.plan_json(planned, expected))
        return
    out.print(tables.plan_tree(loaded.name, planned, expected))
    if expected:
        out.print(*tables.plan_total(total(planned, expected), free_bytes(project.store)), sep="\n", soft_wrap=True)


@app.command()
def artifacts(recipe: RecipeArgument, as_json: Json = False) -> None:
    """List what was built, where it is, and how to serve it."""
    project, loaded = _load(recipe)
    store = open_store(project)
    built = tables.known_artifacts(loaded, make_plan(loaded, project, store), store)
    if as_json:
        _print_json(tables.artifacts_json(built))
    elif built:
        out.print(tables.artifacts_table(built))
        out.print(*tables.serving_lines(loaded, built, project.ollama_models), sep="\n", soft_wrap=True)
    else:
        out.print(f"{loaded.name} has no artifacts yet: finetune run {loaded.name}")


@app.command()
def chat(
    recipe: RecipeArgument,
    using: Annotated[
        str,
        typer.Option("--with", metavar="MODEL", help="base, adapter, merged, gguf or ollama; or several: base,ollama."),
    ] = "ollama",
    message: Annotated[
        str | None, typer.Option("-m", "--message", help="Print the answer to this message and exit.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 256,
) -> None:
    """Chat with the model at any stage; name several stages to compare them."""
    from finetune_assets.cli.conversation import converse, open_engines

    project, loaded = _load(recipe)
    store = open_store(project)
    built = tables.known_artifacts(loaded, make_plan(loaded, project, store), store)
    with open_engines(using, loaded, project, built) as engines:
        converse(engines, out, system=loaded.system, message=message, max_new_tokens=max_new_tokens)


@app.command()
def verify(recipe: RecipeArgument, as_json: Json = False) -> None:
    """Check that the served model is the one that was built."""
    from finetune_assets.cli.verification import all_good, print_verification, verification_json
    from finetune_assets.export.ollama.verify import verify as verify_served

    project, loaded = _load(recipe)
    checks_of = verify_served(loaded.name, project, open_store(project), _print_progress)
    if as_json:
        _print_json(verification_json(checks_of))
    else:
        print_verification(out, checks_of)
    if not all_good(checks_of):
        raise typer.Exit(1)


@app.command()
def explain(
    asset: Annotated[str, typer.Argument(metavar="RECIPE/ASSET", help="For example: demo/lora_adapter.")],
    as_json: Json = False,
) -> None:
    """List everything that an artifact was built from: rows, values, versions, seeds."""
    from finetune_assets.cli import history
    from finetune_assets.lineage.ancestry import ancestry
    from finetune_assets.lineage.retention import subjects

    spec, _, name = asset.rpartition("/")
    if not spec or name not in NODES:
        message = f"{asset!r} is not of the form RECIPE/ASSET{did_you_mean(name, NODES)}"
        raise BadInput(message, "for example: demo/lora_adapter")
    project = Project.find()
    store = open_store(project)
    recipe = subjects([spec], project, store)[0].name  # works without the recipe's file, too
    ancestors = ancestry(recipe, name, store)
    if as_json:
        _print_json({"recipe": recipe, "asset": name, "ancestry": [item.described() for item in ancestors]})
    else:
        out.print(history.ancestry_tree(recipe, ancestors))


@app.command()
def rollback(
    recipe: RecipeArgument,
    to: Annotated[
        str | None, typer.Option("--to", metavar="FINGERPRINT", help="The model to serve; its first digits are enough.")
    ] = None,
) -> None:
    """Serve an earlier model again: the previous one, or the one that --to names."""
    from finetune_assets.export.ollama import rollback as back
    from finetune_assets.export.ollama.publish import place_of

    project, loaded = _load(recipe)
    store = open_store(project)
    served = back.rollback(loaded.name, project, store, _print_progress, to=to)
    facts = served.metrics
    out.print(
        Text(f"{facts['name']} is {served.fingerprint} again, built {tables.moment(served.created)}", style="bold"),
        soft_wrap=True,
    )
    place = place_of(facts, project.ollama_models)
    out.print(f"served from the {facts['where']} {place}", markup=False, highlight=False, soft_wrap=True)
    after = make_plan(loaded, project, store)[back.ASSET]
    out.print(tables.planned_line(after), soft_wrap=True)
    if after.state != "fresh":
        out.print(f"the recipe describes a different model: finetune run {loaded.name} serves that one", soft_wrap=True)


@app.command()
def gc(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(metavar="RECIPE", help="Only these recipes (default: all that have artifacts)."),
    ] = None,
    keep: Annotated[int, typer.Option(min=0, help="How many of each asset's newest artifacts are always kept.")] = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be removed, and remove nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Remove artifacts that nothing needs and that a run can build again."""
    from finetune_assets.cli import history
    from finetune_assets.lineage.retention import collect, subjects

    project = Project.find()
    store = open_store(project)
    done = collect(subjects(recipes or [], project, store), project, store, keep=keep, dry_run=dry_run)
    if as_json:
        _print_json(history.collection_json(done, dry_run))
    else:
        history.print_collection(out, done, dry_run)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine and report what to do: Python, torch, GPU, memory, disk, hub, Ollama, llama.cpp."""
    from finetune_assets.cli.doctor import as_json as checks_json
    from finetune_assets.cli.doctor import checks

    project = Project.find()
    results = checks(project.home, project.cache)
    if as_json:
        _print_json(checks_json(results))
    else:
        out.print(tables.checks_table(results))
    if any(check.state == "fail" for check in results):
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the recipe's JSON schema, for editors."""
    _print_json(json_schema())


def main() -> None:
    """Run the command line; print a failure as one message, with a traceback only if --debug is given."""
    mask_logging()
    debug = "--debug" in sys.argv
    sys.argv[1:] = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        app()
    except FinetuneError as error:
        if debug:
            err.print(traceback.format_exc(), soft_wrap=True, highlight=False)
            sys.exit(error.exit_code)
        err.print(Text(error.message, style="bold red"), soft_wrap=True)
        if error.hint:
            err.print(Text(error.hint), soft_wrap=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if debug:
            err.print(traceback.format_exc(), soft_wrap=True, highlight=False)
            sys.exit(1)
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        err.print(Text(f"{named}\nrun again with --debug for the traceback", style="bold red"), soft_wrap=True)
        sys.exit(1)
    except Exception as error:
        if debug:
            err.print(traceback.format_exc(), soft_wrap=True, highlight=False)
            sys.exit(1)
        what = f"unexpected {type(error).__name__}: {error}\nrun again with --debug for the traceback"
        err.print(Text(what, style="bold red"), soft_wrap=True)
        sys.exit(1)


def _load(spec: str) -> tuple[Project, Recipe]:
    project = Project.find()
    # Dagster and the steps read DAGSTER_HOME: set it, so that a command started anywhere uses the same home
    os.environ.setdefault("DAGSTER_HOME", str(project.home))
    return project, load_recipe(find_recipe(spec, project.configs))


def _assets(names: list[str]) -> list[str]:
    for name in names:
        if name not in NODES:
            raise BadInput(f"--to: unknown asset {name!r}{did_you_mean(name, NODES)}")
    return names


def _print_progress(event: Event) -> None:
    """Print a message of a long command on standard error, apart from its output."""
    if isinstance(event, Message):
        err.print(event.text, style="dim", markup=False)


def _print_json(value: Any) -> None:
    print(printable_json(masked(value)))
