"""Proofs that a merged model and its GGUF files compute what was trained. Front door: `prove`."""
