"""The webhook that reports failed runs: any service that accepts JSON over HTTP (Slack, for one, reads `text`)."""

from __future__ import annotations

import json
import os
import urllib.request
from urllib.error import URLError

import dagster as dg

VARIABLE = "FINETUNE_FAILURE_WEBHOOK"
TIMEOUT_SECONDS = 10


class WebhookResource(dg.ConfigurableResource):
    """A webhook whose address is in an environment variable, because it is a secret that no log may show.

    Args:
        ui: address of the Dagster UI, for links to runs.
    """

    ui: str = "http://127.0.0.1:3000"

    @property
    def is_set(self) -> bool:
        return bool(os.environ.get(VARIABLE))

    def post_failure(self, *, recipe: str | None, run_id: str, asset: str | None, message: str) -> None:
        """Post a failed run.

        Raises:
            RuntimeError: the address could not be reached, or refused the post.
        """
        link = f"{self.ui}/runs/{run_id}"
        body = {
            "text": f"{asset or recipe or 'a run'} failed: {message}\n{link}",
            **{"recipe": recipe, "asset": asset, "run_id": run_id, "message": message, "link": link},
        }
        headers = {"Content-Type": "application/json"}
        try:
            call = urllib.request.Request(os.environ[VARIABLE], json.dumps(body).encode(), headers, method="POST")
            with urllib.request.urlopen(call, timeout=TIMEOUT_SECONDS):
                pass
        except (OSError, ValueError) as error:
            why = f"{error.reason}" if isinstance(error, URLError) else type(error).__name__
            raise RuntimeError(f"the failure of run {run_id} could not be posted to {VARIABLE}: {why}") from None
