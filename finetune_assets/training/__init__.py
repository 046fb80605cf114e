"""Training of an adapter. No Dagster and no artifact store here. Front door: `stages/by_name`."""
