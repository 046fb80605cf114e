"""What each asset reads, whether it is stale, what it costs, and how it is published.

It knows nothing of Dagster. Front doors: `plan` and `materialise`.
"""
