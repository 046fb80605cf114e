"""Files that people and hubs provide: regular files only, within limits, and no code of a model.

No other room opens such files itself. Front doors: `regular_files`, `json_text`, `pydantic_errors`, `remote_code`.
"""
