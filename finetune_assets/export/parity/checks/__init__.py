"""Exact checks of a GGUF file against the model that it was made from, one module for each kind."""
