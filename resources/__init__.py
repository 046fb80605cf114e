"""Dagster resources: the device, worker processes, the webhook, and the end of dead runs."""
