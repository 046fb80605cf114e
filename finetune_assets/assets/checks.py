"""Asset checks: what proves a step, as named checks with the figures on record.

A step proves its result before it publishes it. The checks show that proof, also of an artifact that is used again.
They are read from the artifact; none of them computes a model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import dagster as dg

from finetune_assets.data.prepare import SPLITS
from finetune_assets.data.rows import numbered_rows
from finetune_assets.export.parity.limits import NEAR_THE_BASE, largest_kl
from finetune_assets.export.parity.prove import CHECKS as PARITY
from finetune_assets.recipe import Recipe
from finetune_assets.store.artifact import Artifact

WRITTEN = ("weights", "template", "system", "stops", "parameters")
ANSWERED = ("prompt tokens", "first tokens", "stops by itself")
GGUF_FAILURE = re.compile(r"^(?:the GGUF file .* \((?P<a>\w+)\) is not the merged model|(?P<b>\w+) is too coarse)")
LISTED_FAILURE = re.compile(r"^  check (?P<name>[^:]+): (?P<found>.*)$")
SERVED_FAILURE = re.compile(r"does not serve \S+ as it was made: (?P<all>.*)")


class Verdict(NamedTuple):
    """The outcome of a check, with the figures that it rests on."""

    passed: bool
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Check:
    """One check of an asset.

    Args:
        verdict: reads the outcome from an artifact.
        severity: of a failure. WARN: the step publishes all the same.
        blocking: in a run, nothing downstream of a failure is materialised.
    """

    name: str
    description: str
    verdict: Callable[[Artifact], Verdict]
    severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR
    blocking: bool = False


def _dataset_info(recipe: Recipe) -> list[Check]:
    text = "No conversation is in two of the splits train, validation and test."
    return [Check("splits_share_no_row", text, _shared_rows, blocking=True)]


def _shared_rows(artifact: Artifact) -> Verdict:
    ids = {name: {row["id"] for _, row in numbered_rows(artifact.path / f"{name}.jsonl")} for name in SPLITS}
    counts = {f"{name} rows": len(ids[name]) for name in SPLITS}
    shared = sum(map(len, ids.values())) - len(set().union(*ids.values()))
    return Verdict(shared == 0, {"rows in two splits": shared, **counts})


def _merged_model(recipe: Recipe) -> list[Check]:
    def logits(artifact: Artifact) -> Verdict:
        check = artifact.metrics["check"]
        figures = {
            "relative distance": check["difference"],
            "limit": check["allowed"],
            "distance that the adapter makes": check["effect"],
            "KL that the adapter makes (nats per token)": check["kl_from_base"],
            "positions": check["places"],
            "computed": f"{check['precision']} on {check['device']}",
        }
        return Verdict(check["difference"] <= check["allowed"], figures)

    def weights(artifact: Artifact) -> Verdict:
        compared = artifact.metrics["check"]["weights_compared"]
        return Verdict(compared > 0, {"tensors compared": compared})

    return [
        Check("logits", "The merged model computes what base and adapter compute together, on held-out rows.", logits),
        Check("weights", "Every merged tensor is the one that PEFT computes, to within its precision.", weights),
    ]


def _gguf_file(recipe: Recipe) -> list[Check]:
    exact = [_exact(name) for name in PARITY if name != "kl"]
    return [*exact, *(check for kind in recipe.gguf.types for check in _of_type(kind, recipe))]


def _exact(name: str) -> Check:
    def verdict(artifact: Artifact) -> Verdict:
        files = artifact.manifest["files"]
        rows = [
            {"type": kind, "file": entry["file"], "sha256": files[entry["file"]]["sha256"]}
            for kind, entry in artifact.metrics["types"].items()
        ]
        return Verdict(name in artifact.metrics["checks"], {"files": _table(rows)})

    return Check(_plain(name), f"Every file agrees with the merged model: {name}. Compared exactly.", verdict)


def _of_type(kind: str, recipe: Recipe) -> list[Check]:
    def near(artifact: Artifact) -> Verdict:
        entry = artifact.metrics["types"][kind]
        limit = largest_kl(kind, entry["reference"], recipe.gguf.max_kl)
        figures = {
            "mean KL (nats per token)": entry["kl"],
            "limit": limit,
            "top-1 agreement": entry["top1"],
            "perplexity ratio": entry["ppl_ratio"],
            "positions": entry["points"],
        }
        return Verdict(entry["kl"] <= limit, figures)

    def small(artifact: Artifact) -> Verdict:
        kl, changed = artifact.metrics["types"][kind]["kl"], artifact.metrics["kl_from_base"]
        figures = {"quantisation error (nats per token)": kl, "change by training (nats per token)": changed}
        return Verdict(kl <= NEAR_THE_BASE * changed, {**figures, "largest share": NEAR_THE_BASE})

    return [
        Check(f"kl_{kind}", f"The next-token distributions of {kind} are close to the merged model's.", near),
        Check(
            f"keeps_training_{kind}",
            f"The quantisation error of {kind} is small compared with what training changed.",
            small,
            dg.AssetCheckSeverity.WARN,
        ),
    ]


def _ollama_model(recipe: Recipe) -> list[Check]:
    def digest(artifact: Artifact) -> Verdict:
        return Verdict(bool(artifact.metrics["digests"]), {"models": _served_table(artifact)})

    def written(artifact: Artifact) -> Verdict:
        return Verdict(True, {"models": _served_table(artifact)})

    def answered(artifact: Artifact) -> Verdict:
        asked = artifact.metrics["where"] == "server"
        why = {} if asked else {"not asked": "no Ollama server answered; start one, and run again"}
        return Verdict(asked, {"models": _served_table(artifact), **why})

    return [
        Check("digest", "Every name serves the manifest that this artifact put there.", digest),
        *(Check(_plain(name), f"What is served has the {name} of this artifact.", written) for name in WRITTEN),
        *(
            Check(
                _plain(name),
                f"Asked a question before it took over, the server agreed with llama.cpp: {name}.",
                answered,
                dg.AssetCheckSeverity.WARN,
            )
            for name in ANSWERED
        ),
    ]


def _served_table(artifact: Artifact) -> dg.MetadataValue:
    facts = artifact.metrics
    rows = [
        {
            "name": name,
            "type": facts["models"][name]["type"],
            "digest": digest,
            "weights": facts["models"][name]["sha256"],
            "served by": facts.get("served", {}).get(name, {}).get("by", "the project's own model store"),
        }
        for name, digest in facts["digests"].items()
    ]
    return _table(rows)


CHECKS: Mapping[str, Callable[[Recipe], Sequence[Check]]] = {
    "dataset_info": _dataset_info,
    "merged_model": _merged_model,
    "gguf_file": _gguf_file,
    "ollama_model": _ollama_model,
}
"""The checks of each asset for a recipe. An asset that is not here has none."""


def checks_of(asset: str, recipe: Recipe) -> Sequence[Check]:
    """Return the checks of an asset, in the order of its Checks tab."""
    return CHECKS[asset](recipe) if asset in CHECKS else ()


def check_specs(asset: str, recipe: Recipe, key: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    """Declare the checks of an asset to Dagster."""
    return [
        dg.AssetCheckSpec(check.name, asset=key, description=check.description, blocking=check.blocking)
        for check in checks_of(asset, recipe)
    ]


def check_results(asset: str, recipe: Recipe, artifact: Artifact, key: dg.AssetKey) -> list[dg.AssetCheckResult]:
    """Read the results of an asset's checks from its artifact."""
    return [_result(check, artifact, key) for check in checks_of(asset, recipe)]


def check_evaluations(
    asset: str, recipe: Recipe, artifact: Artifact, key: dg.AssetKey
) -> Iterator[dg.AssetCheckEvaluation]:
    """Yield the same results as events that need no run."""
    for result in check_results(asset, recipe, artifact, key):
        yield dg.AssetCheckEvaluation(
            asset_key=key,
            check_name=str(result.check_name),
            passed=result.passed,
            metadata=result.metadata,
            severity=result.severity,
            description=result.description,
        )


def failed_checks(asset: str, recipe: Recipe, message: str, key: dg.AssetKey) -> list[dg.AssetCheckResult]:
    """Return the checks that a step's error names; such a step publishes nothing, and its other checks have no result.

    The step runs in a child process, whose error is a text.
    """
    failures = _failures(message)
    return [
        dg.AssetCheckResult(asset_key=key, check_name=check.name, passed=False, description=failures[check.name])
        for check in checks_of(asset, recipe)
        if check.name in failures
    ]


def _failures(message: str) -> dict[str, str]:
    """Return the checks that an error names, and the finding of each."""
    failures: dict[str, str] = {}
    kind = ""
    for line in message.splitlines():
        if header := GGUF_FAILURE.match(line):
            kind = header["a"] or header["b"]
        elif listed := LISTED_FAILURE.match(line):
            name = f"kl_{kind}" if listed["name"] == "kl" else _plain(listed["name"])
            found = f"{kind}: {listed['found']}" if kind else listed["found"]
            failures[name] = f"{failures[name]}\n{found}" if name in failures else found
        elif served := SERVED_FAILURE.search(line):
            failures |= {_plain(name): served["all"] for name in (*WRITTEN, *ANSWERED) if f"{name}: " in served["all"]}
    return failures


def _result(check: Check, artifact: Artifact, key: dg.AssetKey) -> dg.AssetCheckResult:
    severity, description = check.severity, None
    try:
        passed, figures = check.verdict(artifact)
    except (KeyError, TypeError):
        passed, figures, severity = False, {}, dg.AssetCheckSeverity.WARN
        description = "An earlier release built this artifact, and did not record this check."
    return dg.AssetCheckResult(
        asset_key=key,
        check_name=check.name,
        passed=passed,
        metadata=figures,
        severity=severity,
        description=description,
    )


def _plain(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _table(rows: Sequence[Mapping[str, Any]]) -> dg.MetadataValue:
    return dg.MetadataValue.table([dg.TableRecord(dict(row)) for row in rows])
