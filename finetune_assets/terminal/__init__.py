"""What the command line shows: plans, live progress, results."""
