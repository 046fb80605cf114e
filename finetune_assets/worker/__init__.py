"""The child process that does heavy work, and how it is launched, watched and stopped. Front door: `launch`."""
