"""Instruction data in, a model served by Ollama out: fine-tuning as software-defined assets."""

__version__ = "0.1.0"
