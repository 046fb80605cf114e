"""From registered data files to validated, split conversations."""
