"""The tasks of a worker process, one in each file; importing them imports no ML library. Front door: `task`."""
