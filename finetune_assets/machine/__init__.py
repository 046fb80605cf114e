"""The machine that the program runs on: devices, cores, disks, and the environment of child processes.

This room knows nothing of recipes and models. Front doors: `device.choose_device`, `cores.cores`, `disk`,
`child_environment`.
"""
