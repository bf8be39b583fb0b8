"""What ties a child process to its parent; for whatever child of ours, as light as they are."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies.

    A closed socket would do in most cases, but not while the child computes, nor when another
    child of the parent has inherited the other end by a fork.

    Args:
        parent_pid: Who started this process.
    """
    # Ctrl-C and a supervisor's SIGTERM reach the whole group; the parent still drains then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)
