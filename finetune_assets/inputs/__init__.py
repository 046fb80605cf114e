"""Reading of files that people and hubs give: regular files only, within limits, no code of a model.

No other room opens such files unchecked.
"""
