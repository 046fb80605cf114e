"""A stand-in for an Ollama server, and the models and templates that tests serve with it."""
