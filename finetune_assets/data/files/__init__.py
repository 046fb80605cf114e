"""Readers of data files, one module for each kind of file. They return rows, whatever the rows mean."""
