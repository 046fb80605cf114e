"""File formats of models: safetensors, GGUF, model cards. Reading and writing only."""
