"""Go templates: derived from Jinja chat templates, evaluated and proven equal to them.

Front doors: `derive` and `proof`.
"""
