"""What the outside world is to the assets: device, model sources, artifact store, Ollama."""
