"""Engines that answer a conversation, each in its file: transformers, llama.cpp, Ollama.

Front door: `engine`, which says what an engine is.
"""
