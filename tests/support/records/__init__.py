"""Programs that make the records in tests/fixtures, and the models that they are made of."""
