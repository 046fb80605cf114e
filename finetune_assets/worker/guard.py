"""Runs one command in a process group of its own and sees to it that nothing of the group is left behind.

Started by `launch` as `python guard.py GRACE_SECONDS FD,FD... COMMAND...`; the command inherits the file descriptors
named. Its own standard input is a lifeline: the other end is held by the launcher, and when that closes, for whatever
reason (the launcher cancelled, crashed, was killed), the group gets TERM and, after the grace period, KILL. What is
left of the group when the command ends by itself gets KILL; so does, on Linux, what had left the group.
Exit code: the command's; 128 + signal number where a signal ended it.

Standard library only, one thread, no project imports: it must start at once and outlive any trouble in the command.
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
    """A function that asks the Linux kernel for signal `number` when the parent dies; it does nothing elsewhere.

    The kernel means the parent *thread*: only for starters that wait in the thread they start from.
    """
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def arm() -> None:
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, number)

    return arm


def adopt_orphans() -> None:
    """Become the parent of every descendant that loses its own, whatever group or session it is in (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def kill_children() -> None:
    """KILL the children of this process, and theirs as these become ours, until none is left."""
    listing = Path(f"/proc/self/task/{os.getpid()}/children")
    while listing.exists() and (children := listing.read_text(encoding="ascii").split()):
        for child in children:
            os.kill(int(child), signal.SIGKILL)
            os.waitpid(int(child), 0)


def signal_group(group: int, number: int) -> bool:
    """Send a signal to every process of the group; False when none is left."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # macOS answers "not permitted" for a group of zombies
        return False
    return True


def main() -> int:
    grace_seconds, fds, command = float(sys.argv[1]), sys.argv[2], sys.argv[3:]
    wake, woken = os.pipe()
    for end in (wake, woken):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(woken)  # a child's end or a signal to us wakes select() below
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: asked.append(True))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # Beside the lifeline: a launcher that forked may have left its end of that open in another process.
    parent_death_signal(signal.SIGTERM)()
    adopt_orphans()
    # preexec_fn is safe here: one thread. It ties the command to us, should we be killed ourselves.
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        process_group=0,
        pass_fds=[int(fd) for fd in fds.split(",") if fd],
        preexec_fn=parent_death_signal(signal.SIGKILL),
    )
    while child.poll() is None and not asked:
        readable, _, _ = select.select([sys.stdin.fileno(), wake], [], [])
        if wake in readable:
            os.read(wake, 512)
        if sys.stdin.fileno() in readable and not os.read(sys.stdin.fileno(), 512):
            break
    if child.poll() is None and signal_group(child.pid, signal.SIGTERM):
        deadline = time.monotonic() + grace_seconds
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    signal_group(child.pid, signal.SIGKILL)  # whatever ignored TERM, and grandchildren
    status = child.wait()
    kill_children()  # torchrun, for one, gives every rank a session of its own
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
