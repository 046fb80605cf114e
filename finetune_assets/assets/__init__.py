"""The Dagster side: each asset's wiring and what its page shows."""
