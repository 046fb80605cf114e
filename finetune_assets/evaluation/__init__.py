"""Scores of models on the test split: answers, metrics, perplexity.

No training here. Front door: `evaluate`.
"""
