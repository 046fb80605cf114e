"""Row formats, one module each: what a row of a file means as a conversation."""
