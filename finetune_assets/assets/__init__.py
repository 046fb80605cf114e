"""The Dagster side: eight thin assets, one file each.

The assets contain no ML code: they call the rooms below. Front door: `all_assets`.
"""
