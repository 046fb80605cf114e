"""The way from an adapter to a served model: merge, GGUF files, proofs, Ollama. Nothing is trained here."""
