"""The sections of a recipe: one module each, with its keys, their limits and their checks.

Front door: `finetune_assets.recipe`, which hands the sections on. No section imports another one.
"""
