"""Heavy work in a process of its own: starting it, watching over it, and the worker itself."""
