"""Calls to an Ollama server, and a temporary server of the project. Nothing is decided here. Front door: `api`."""
