"""The machine that the program runs on: devices, cores, disks, the environment of child processes."""
