"""The child process for heavy work, and its launcher, which watches and stops it. Front door: `launch`."""
