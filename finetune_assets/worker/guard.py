"""The guard of one command: it runs the command in a separate process group and ends every process of that group.

Started by `launch` as `python guard.py GRACE_SECONDS FD,FD... COMMAND...`; the command inherits the named
file descriptors. The guard's standard input is a lifeline whose other end the launcher holds. When the lifeline closes
(the launcher cancelled, crashed or was killed), the group gets TERM and, after the grace period, KILL. When the command
ends by itself, the rest of the group gets KILL. On Linux, so do descendants that had left the group.
Exit code: the command's; 128 + signal number if a signal ended it.

Standard library only, one thread, no project imports: it must start at once and outlive every failure of the command.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def parent_death_signal(number: int) -> Callable[[], None]:
    """Return a function that asks the Linux kernel for signal `number` when the parent dies; elsewhere it does nothing.

    For the kernel the parent is a *thread*: use this only if the thread that starts the child also waits for it.
    """
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def arm() -> None:
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, number)

    return arm


def adopt_orphans() -> None:
    """Become the parent of every orphaned descendant, whatever group or session it is in (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def kill_children() -> None:
    """KILL the children of this process, and then the orphans that it adopts from them, until none is left."""
    listing = Path(f"/proc/self/task/{os.getpid()}/children")
    while listing.exists() and (children := listing.read_text(encoding="ascii").split()):
        for child in children:
            os.kill(int(child), signal.SIGKILL)
            os.waitpid(int(child), 0)


def signal_group(group: int, number: int) -> bool:
    """Send a signal to every process of the group; return False when none is left."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # macOS reports "not permitted" for a group of zombies
        return False
    return True


def main() -> int:
    """Run the command, end its group, and return the exit code."""
    grace_seconds, fds, command = float(sys.argv[1]), sys.argv[2], sys.argv[3:]
    wake, woken = os.pipe()
    for end in (wake, woken):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(woken)  # the child's end, or a signal to this process, wakes select() below
    signalled = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: signalled.append(True))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # The lifeline is not enough: if the launcher forked, a second process may hold its end open.
    parent_death_signal(signal.SIGTERM)()
    adopt_orphans()
    # preexec_fn is safe here, as there is one thread. It ends the command if this process is killed.
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        process_group=0,
        pass_fds=[int(fd) for fd in fds.split(",") if fd],
        preexec_fn=parent_death_signal(signal.SIGKILL),
    )
    while child.poll() is None and not signalled:
        readable, _, _ = select.select([sys.stdin.fileno(), wake], [], [])
        if wake in readable:
            os.read(wake, 512)
        if sys.stdin.fileno() in readable and not os.read(sys.stdin.fileno(), 512):
            break
    if child.poll() is None and signal_group(child.pid, signal.SIGTERM):
        deadline = time.monotonic() + grace_seconds
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    signal_group(child.pid, signal.SIGKILL)  # processes that ignored TERM, and grandchildren
    status = child.wait()
    kill_children()  # torchrun, for example, starts every rank in a new session
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
