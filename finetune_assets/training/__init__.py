"""Supervised fine-tuning of LoRA adapters, on whatever device there is."""
