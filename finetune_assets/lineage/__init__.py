"""What each asset reads, whether it is stale, what it costs, and how it is published.

The room does not know Dagster. Front doors: `plan` and `materialise`.
"""
