"""Base models and how they are found, loaded and run.

Nothing is trained or converted here. Front doors: `base_model` and `loading`.
"""
