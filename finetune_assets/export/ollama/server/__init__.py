"""Calls to an Ollama server, and a temporary server for the project, without any decisions. Front door: `api`."""
