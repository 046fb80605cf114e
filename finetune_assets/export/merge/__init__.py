"""Merge of an adapter into its base model, block by block. Front door: `merge`."""
