"""Checks before training that the base model can be exported and served. Front door: `exportable`."""
