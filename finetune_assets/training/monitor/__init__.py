"""What is recorded while a model is trained: the log of steps and the loss curve."""
