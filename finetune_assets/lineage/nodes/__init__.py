"""One module for each asset: what it reads, which tools decide its bytes, what it costs, what it shows first.

The only place in `lineage` that imports the rooms that compute; it never computes an artifact itself. Each module
exports NODE, which `graph` assembles.
"""
