"""Training methods, one module each: which weights are trained. Front door: `by_name`."""
