"""From adapter to served model: merge, GGUF, quantise, Modelfile, Ollama."""
