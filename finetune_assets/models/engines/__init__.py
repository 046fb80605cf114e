"""Engines that answer a conversation: transformers, llama.cpp, Ollama.

Front door: `engine`, which defines the protocol.
"""
