"""Training of an adapter. It knows nothing of Dagster and of the store. Front door: `stages`."""
