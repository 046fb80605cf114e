"""Readers of data files, one module for each kind of file. They return rows and know nothing of their meaning."""
