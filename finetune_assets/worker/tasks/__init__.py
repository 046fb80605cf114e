"""The tasks that a worker process does, one in each file; loading them loads no ML library. Front door: `task`."""
