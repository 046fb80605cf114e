"""Rows from a registry entry to checked splits. Nothing here knows of models or training. Front door: `prepare`."""
