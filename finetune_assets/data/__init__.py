"""Data sets, from a registry entry to validated splits. No model and no training here. Front door: `prepare`."""
