"""The page on runs that start by themselves; what it says of assets, sensors and seconds is read from the code.

usage: python -m docs.automation > docs/automation.md
"""

from __future__ import annotations

from finetune_assets.assets.all_assets import STEPS
from finetune_assets.assets.automation.sensors import OBSERVE_SECONDS
from finetune_assets.recipe import ScheduleSection
from finetune_assets.worker.launch import GRACE_SECONDS
from resources.gpu import POOL

PAGE = """# Runs that start by themselves

Printed by `python -m docs.automation`.

`make ui` starts Dagster's web server and its daemon. The daemon runs the sensors and schedules below. Nothing starts a
run unless a recipe asks for it:

```yaml
schedule:
  on_change: true                   # the retrain sensor
  minimum_interval_seconds: {interval}      # how often it looks
  cron: "0 3 * * *"                 # and, or instead: at these times
  execution_timezone: Asia/Shanghai
```

| | initial state | what it does |
|---|---|---|
| sensor `observe` | on | checks recipes and data sets every {observe} s, reports changes to Dagster; starts no run |
| sensor `<recipe>_retrain` | on with `schedule.on_change` | starts a run for stale assets |
| schedule `<recipe>_schedule` | exists with `schedule.cron` | starts a run for stale assets, at its times |
| sensor `failure_webhook` | on | posts failed runs to `FINETUNE_FAILURE_WEBHOOK`, if that is set |

## What the UI shows

The lineage begins with two kinds of nodes that nobody materialises:

- `datasets/<name>`: the file and the registry entry of a data set;
- `<recipe>/<asset>_config`: the recipe values and tool versions that one asset reads. Its page has the values and the
  plan's reasons.

After an edit, `observe` reports their new versions, and the assets that read them become *stale*. You need not reload
the code location.

Dagster judges whole assets. It would call `ollama_model` stale after a new GGUF type that is not served, and it would
not notice a damaged file. For this reason, `observe` reports the plan's verdicts to Dagster:

- An asset that is up to date in `finetune plan` gets a materialisation event without a run ("already published").
- When a published file is damaged, the `_config` node has a special version until the file is repaired.

So badges and plan agree. The provenance of an asset names the versions that it read, not the versions observed last.

## The retrain sensor

The sensor asks the same plan as `finetune plan`: it compares published artifacts with what the recipe asks for. It does
not miss a change that happens while it is off or while a run is active. It starts one run for all stale assets when

- no run of the recipe is queued or active, however that run was started;
- two evaluations in a row find the same state, so that half-copied files are not trained on;
- the last run for exactly this state (values, file digests, code versions) did not fail and was not cancelled. After a
  failure, the sensor tries again when something changes. You, or the schedule, can try again at any time.

A recipe that cannot be read fails the ticks of its own sensor, with the line and the key. The others continue.

## One device, many runs

{children} compute in a child process, which releases all memory when it ends.
In Dagster these assets share the pool `{pool}`. It has one slot.
`dagster instance concurrency set {pool} N` gives it N slots.
A lock for each device also covers everything else of the same user on the machine: the command line, other checkouts,
other instances. With several GPUs, each process gets its own GPU. `CUDA_VISIBLE_DEVICES` limits which GPUs are used.

Cancelling a run, in the UI or with Ctrl-C, ends the child process and its children: TERM, {grace:.0f} seconds, KILL.
The same happens when the run's own process dies. A killed run cannot report its end; `observe`, the retrain
sensors and the next `finetune run` detect that its process is gone, mark it as failed and free its slots.

## Notifications of failures

```bash
FINETUNE_FAILURE_WEBHOOK=https://hooks.example.com/services/... make ui
```

The body is JSON: `text` (shown by Slack and similar services), `recipe`, `asset`, `run_id`, `message`, `link`. Such
addresses are secrets: they are read from the environment only and appear in no log.
"""


def page() -> str:
    """Return the page as text."""
    *names, last = (f"`{step.name}`" for step in STEPS if step.pool == POOL)
    return PAGE.format(
        interval=ScheduleSection().minimum_interval_seconds,
        observe=OBSERVE_SECONDS,
        children=f"{', '.join(names)} and {last}",
        pool=POOL,
        grace=GRACE_SECONDS,
    )


if __name__ == "__main__":
    print(page(), end="")
