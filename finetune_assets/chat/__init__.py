"""The chat template, and talking to a model at each stage of its making."""
