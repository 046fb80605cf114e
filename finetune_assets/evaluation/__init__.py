"""Scores on held-out rows, base against tuned."""
