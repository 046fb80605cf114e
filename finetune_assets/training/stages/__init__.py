"""Training stages, one module each. Front door: `by_name`."""
