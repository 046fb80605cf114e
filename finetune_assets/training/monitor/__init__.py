"""Records of a training run: log of steps, loss curve, peak memory."""
