"""Scores of a model on held-out rows: generation, metrics, perplexity.

Nothing is trained here. Front door: `evaluate`.
"""
