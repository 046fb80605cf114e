"""The Dagster side: eight thin assets, one file each.

No work is done here: assets call into the rooms below. Front door: `all_assets`.
"""
