"""Row formats, one module each: how a row of a file becomes a conversation. Front door: `by_name`."""
