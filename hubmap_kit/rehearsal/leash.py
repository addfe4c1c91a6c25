"""`python leash.py PID COMMAND...`: becomes COMMAND, and ends with the process PID that started it, however that one
ends.

Even SIGKILL, which no process can answer, then takes along a session, or the making of its environment. A program of
its own, because the wish to end with one's parent must be made between fork and exec, where a process with threads may
run no Python. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def leashed(*command: str) -> list[str]:
    """What to run instead of `command`, so that it ends with this process."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


if __name__ == "__main__":
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0):
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        sys.exit("its parent is gone already")
    os.execvp(command[0], command)
